module github.com/mysocketio/mysocket-injector

go 1.26
