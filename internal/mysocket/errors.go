package mysocket

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// ErrCredentials is wrapped by every error that only another account can mend: the API refused it, or there
// is none.
var ErrCredentials = errors.New("the Mysocket account can't be used")

// APIError is an answer of the API that is not a success.
type APIError struct {
	// Op is what was asked, for example "POST /socket".
	Op string
	// Status is the HTTP status.
	Status int
	// Message is the API's own error_message, bounded; may be empty.
	Message string
	// RetryAfter is how long the API asked to wait; zero when it did not.
	RetryAfter time.Duration
}

// Error says what was asked and what the API answered.
func (e *APIError) Error() string {
	s := strings.TrimSpace(fmt.Sprintf("the Mysocket API answered %s with %d %s", e.Op, e.Status, http.StatusText(e.Status)))
	if e.Message != "" {
		s += ": " + e.Message
	}
	return s
}

// IsNotFound tells whether the API said that the object does not exist.
func IsNotFound(err error) bool {
	var e *APIError
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// IsRefused tells whether the API understood the request and refused it for its content (400, 403, 409, 422): trying the
// same again does not help.
func IsRefused(err error) bool {
	var e *APIError
	if !errors.As(err, &e) {
		return false
	}
	switch e.Status {
	case http.StatusBadRequest, http.StatusForbidden, http.StatusConflict, http.StatusUnprocessableEntity:
		return true
	}
	return false
}

// RetryAfter returns how long the API asked to wait, zero when it did not.
func RetryAfter(err error) time.Duration {
	var e *APIError
	if errors.As(err, &e) {
		return e.RetryAfter
	}
	return 0
}
