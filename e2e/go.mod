module github.com/mysocketio/mysocket-injector/e2e

go 1.26.0
