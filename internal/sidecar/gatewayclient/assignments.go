package gatewayclient

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// silence is how long nothing may come over the stream before it is taken for dead.
const silence = 3 * gatewayapi.Heartbeat

const maxNameBytes = 512

// An id is used in paths, so it must not be able to mean another one.
var validID = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$`)

// ValidID tells whether id may be the id of a socket or a tunnel.
func ValidID(id string) bool { return validID.MatchString(id) }

// Event is what comes over the stream of assignments: a snapshot, or why a line was none.
type Event struct {
	Snapshot gatewayapi.Snapshot
	Err      error
}

// Assignments follows the stream of assignments and calls receive for every line that is not a heartbeat. It returns
// when the stream ends, which it always does with an error.
func (c *Client) Assignments(ctx context.Context, receive func(Event)) error {
	const operation = "stream the assignments"
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	response, err := c.send(ctx, operation, "assignments", http.MethodGet, gatewayapi.AssignmentsPath, nil)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()

	watchdog := c.cfg.Clock.NewTimer(silence)
	defer watchdog.Stop()
	ended := make(chan struct{})
	barked := make(chan struct{})
	go func() {
		defer close(barked)
		select {
		case <-watchdog.C():
			cancel(fmt.Errorf("nothing came over it for %s", silence))
		case <-ended:
		}
	}()
	defer func() { close(ended); <-barked }()

	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, gatewayapi.MaxBodyBytes)
	for lines.Scan() {
		watchdog.Reset(silence)
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue
		}
		snapshot, err := ParseSnapshot(line)
		receive(Event{snapshot, err})
	}
	err = lines.Err()
	switch {
	case context.Cause(ctx) != nil:
		err = context.Cause(ctx)
	case errors.Is(err, bufio.ErrTooLong):
		err = fmt.Errorf("a line is longer than %d bytes", gatewayapi.MaxBodyBytes)
	case err == nil:
		err = io.EOF
	}
	return fmt.Errorf("the gateway's stream of assignments ended: %w", err)
}

// ParseSnapshot reads one line of the stream. A snapshot with anything wrong in it is refused whole: acting on half of it
// would close the tunnels of the other half.
func ParseSnapshot(line []byte) (gatewayapi.Snapshot, error) {
	var wire struct {
		Assignments json.RawMessage `json:"assignments"`
	}
	if err := json.Unmarshal(line, &wire); err != nil {
		return gatewayapi.Snapshot{}, fmt.Errorf("the gateway sent assignments that can't be read: %w", err)
	}
	if wire.Assignments == nil {
		return gatewayapi.Snapshot{}, errors.New(`the gateway sent a line without "assignments"`)
	}
	var list []gatewayapi.Assignment // null, as Go writes an empty list, is one too
	if err := json.Unmarshal(wire.Assignments, &list); err != nil {
		return gatewayapi.Snapshot{}, fmt.Errorf("the gateway sent assignments that can't be read: %w", err)
	}
	if len(list) > gatewayapi.MaxAssignments {
		return gatewayapi.Snapshot{}, fmt.Errorf("the gateway sent %d assignments; a pod may have %d", len(list), gatewayapi.MaxAssignments)
	}
	seen := make(map[string]bool, len(list))
	for _, assignment := range list {
		switch {
		case !ValidID(assignment.SocketID):
			return gatewayapi.Snapshot{}, fmt.Errorf("the gateway sent the socket id %.64q, which is none", assignment.SocketID)
		case seen[assignment.SocketID]:
			return gatewayapi.Snapshot{}, fmt.Errorf("the gateway sent socket %s twice", assignment.SocketID)
		case assignment.Port < 1 || assignment.Port > 65535:
			return gatewayapi.Snapshot{}, fmt.Errorf("the gateway sent port %d for socket %s; a port is 1 to 65535", assignment.Port, assignment.SocketID)
		case assignment.Connections < 0 || assignment.Connections > gatewayapi.MaxConnections:
			return gatewayapi.Snapshot{}, fmt.Errorf("the gateway sent %d connections for socket %s; allowed are 1 to %d", assignment.Connections, assignment.SocketID, gatewayapi.MaxConnections)
		case assignment.ProxyProtocol != "" && assignment.ProxyProtocol != gatewayapi.ProxyV1 && assignment.ProxyProtocol != gatewayapi.ProxyV2:
			return gatewayapi.Snapshot{}, fmt.Errorf("the gateway sent the PROXY protocol version %.16q for socket %s; allowed are v1, v2 and none", assignment.ProxyProtocol, assignment.SocketID)
		case len(assignment.SocketName) > maxNameBytes || len(assignment.Service) > maxNameBytes || len(assignment.URL) > maxNameBytes:
			return gatewayapi.Snapshot{}, fmt.Errorf("the gateway sent names of more than %d bytes for socket %s", maxNameBytes, assignment.SocketID)
		}
		seen[assignment.SocketID] = true
	}
	return gatewayapi.Snapshot{Assignments: list}, nil
}
