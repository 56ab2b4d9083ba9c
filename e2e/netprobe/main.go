// Command netprobe is a client for pods of the end-to-end tests, whose images have no shell:
// run by kubectl exec it looks at the network as its pod sees it.
//
//	netprobe hold            wait to be told to end
//	netprobe lookup NAME     print the addresses of a name
//	netprobe dial ADDR       connect and print what the server sends until it closes
//	netprobe get URL         print the body of an HTTP answer; certificates are not checked
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const limit = 10 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := mainErr(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "netprobe:", err)
		os.Exit(1)
	}
}

func mainErr(ctx context.Context, args []string) error {
	if len(args) == 1 && args[0] == "hold" {
		<-ctx.Done()
		return nil
	}
	if len(args) != 2 {
		return fmt.Errorf("want hold, lookup NAME, dial ADDR or get URL, not %q", args)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	switch args[0] {
	case "lookup":
		addrs, err := (&net.Resolver{PreferGo: true}).LookupHost(ctx, args[1])
		for _, a := range addrs {
			fmt.Println(a)
		}
		return err
	case "dial":
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", args[1])
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
			return err
		}
		_, err = io.Copy(os.Stdout, conn)
		return err
	case "get":
		return get(ctx, args[1])
	}
	return fmt.Errorf("%q is none of hold, lookup, dial, get", args[0])
}

func get(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if _, err := io.Copy(os.Stdout, res.Body); err != nil {
		return err
	}
	if res.StatusCode >= http.StatusBadRequest {
		return fmt.Errorf("GET %s: %s", url, res.Status)
	}
	return nil
}
