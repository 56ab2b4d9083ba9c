# Every target installs what it needs (Debian packages when root, Go modules) or says what is missing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
E2E := go -C e2e
GOLANGCI_LINT_VERSION := v2.15.0
CONTROLLER_GEN_VERSION := v0.23.0
TOOLS := $(CURDIR)/.cache/tools

.DEFAULT_GOAL := help
.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 20

.PHONY: need-go need-test demo demo-existing demo-down
need-go:
	@hack/need.sh
	@[ -e /etc/ssl/certs/ca-certificates.crt ] || hack/need.sh update-ca-certificates=ca-certificates
# -race needs a C compiler; the edge's tests speak to it with OpenSSH's client, paramiko, curl, nghttp and a WebSocket client. systemd judges
# the edge's unit.
need-test:
	@hack/need.sh gcc=gcc as=binutils ssh=openssh-client curl=curl nghttp=nghttp2-client systemd-analyze=systemd unshare=util-linux mount=mount
	@[ -e /usr/include/stdlib.h ] || hack/need.sh missing-libc-headers=libc6-dev
	@[ -e /usr/lib/python3/dist-packages/paramiko ] || hack/need.sh missing-paramiko=python3-paramiko
	@[ -e /usr/lib/python3/dist-packages/websockets ] || hack/need.sh missing-websockets=python3-websockets

demo: need-go ## the main job, end to end: cluster, edge, chart, annotated Service, 60 public requests over 3 pods
	$(E2E) run ./cmd/demo new
demo-existing: need-go ## the same with pods that ran before their Service was annotated
	$(E2E) run ./cmd/demo existing
demo-down: ## end the demo's edge and cluster and remove what they made
	$(E2E) run ./cmd/demo down

.PHONY: test test-unit test-envtest test-status test-e2e screenshot need-chromium
test: test-envtest test-status test-e2e ## all tests
test-unit: need-test ## the tests that need neither an API server nor a cluster, with the race detector
	go test -race ./...
	$(E2E) test -race ./...
test-envtest: need-test ## the same and those against a real API server
	assets=$$($(E2E) run ./cmd/cluster envtest-assets); KUBEBUILDER_ASSETS=$$assets go test -race -timeout 20m ./...
	$(E2E) test -race ./...
test-status: need-test need-chromium ## the edge's status page in a browser
	go test -count=1 -tags chromium -run '^TestStatusPageInChromium$$' ./cmd/mysocket-edge
test-e2e: need-go ## tests of the cluster and on it (needs root); leaves it up, make demo-down ends it
	$(E2E) test -tags cluster -count=1 -timeout 45m -p 1 -v ./cluster ./tests
# Chromium is some 300 MB, so the tests that need no cluster do without it.
need-chromium:
	@hack/need.sh chromium=chromium
	@[ -e /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf ] || hack/need.sh missing-fonts=fonts-dejavu-core
screenshot: need-test need-chromium ## make the picture of the status page in docs/edge.md (about a minute)
	MYSOCKET_STATUS_PICTURE=$(CURDIR)/docs/status-page.png go test -count=1 -tags chromium -run '^TestStatusPageInChromium$$' ./cmd/mysocket-edge

.PHONY: bench bench-admission bench-scale bench-lab bench-tunnel bench-edge bench-leaks
bench: bench-admission bench-scale bench-lab bench-tunnel bench-edge ## measure what the README states
bench-admission: need-go ## measure only how long the API server takes to create a pod, with our webhook and without
	assets=$$($(E2E) run ./cmd/cluster bin); KUBEBUILDER_ASSETS=$$assets go run ./internal/clusterbench admission
bench-scale: need-go ## measure only the control plane with 2,000 Services and 20,000 pods
	assets=$$($(E2E) run ./cmd/cluster bin); KUBEBUILDER_ASSETS=$$assets go run ./internal/clusterbench scale
bench-lab: need-go ## measure only what is seen on the whole cluster; leaves it up, make demo-down ends it
	$(E2E) run ./cmd/measure
bench-tunnel: need-go ## measure tunnels: ours and OpenSSH's, against our edge and sshd, over plain relays and a long way
	@hack/need.sh ssh=openssh-client sshd=openssh-server
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/mysocket-edge ./internal/tunnelbench
	bin/tunnelbench --edge bin/mysocket-edge
bench-edge: need-go ## measure our edge: against haproxy, with 1,000 tunnels, with apps of unequal speed (about 5 minutes)
	@hack/need.sh haproxy=haproxy
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/mysocket-edge ./internal/tunnelbench
	bin/tunnelbench edge --edge bin/mysocket-edge
bench-leaks: need-go ## put 100,000 connections and 1,000 reconnects through one tunnel and see what is left (about 3 minutes)
	MYSOCKET_LEAKS=100000,1000 go test -count=1 -timeout 20m -v -run '^TestADayLeavesNothingBehind$$' ./internal/sidecar

.PHONY: build images generate manifests lint fmt
build: ## build the three programs into bin/
	CGO_ENABLED=0 go build -trimpath -o bin/ ./cmd/...
images: ## build the images, and load them if the cluster is up
	$(E2E) run ./cmd/cluster images
generate: ## regenerate deep copies and the CRD
	go run sigs.k8s.io/controller-tools/cmd/controller-gen@$(CONTROLLER_GEN_VERSION) object paths=./api/... crd paths=./api/... output:crd:dir=charts/mysocket-injector/crds
manifests: need-go ## render manifests/ from the chart
	assets=$$($(E2E) run ./cmd/cluster bin); hack/manifests.sh "$$assets/helm" manifests
lint: $(TOOLS)/golangci-lint-$(GOLANGCI_LINT_VERSION) ## golangci-lint on both modules
	$< run --build-tags chromium ./...
	cd e2e && $< run --build-tags cluster ./...
fmt: ## gofmt
	gofmt -w $$(git ls-files '*.go')
$(TOOLS)/golangci-lint-$(GOLANGCI_LINT_VERSION):
	GOBIN=$(TOOLS) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
	mv $(TOOLS)/golangci-lint $@

.PHONY: cluster-up cluster-down
cluster-up: ## only the cluster
	$(E2E) run ./cmd/cluster up
cluster-down: ## end the cluster
	$(E2E) run ./cmd/cluster down
