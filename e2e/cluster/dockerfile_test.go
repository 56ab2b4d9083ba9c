package cluster

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const goodDockerfile = `# a comment
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/webhook ./cmd/webhook

FROM scratch
LABEL org.opencontainers.image.title="control plane" \
      org.opencontainers.image.licenses=Apache-2.0
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /out/webhook /webhook
USER 65532:65532
EXPOSE 10250 53/udp
ENTRYPOINT ["/webhook"]
`

func TestParseDockerfile(t *testing.T) {
	got, err := parseDockerfile("Dockerfile", strings.NewReader(goodDockerfile), map[string]string{"VERSION": "v1.2.3"})
	if err != nil {
		t.Fatal(err)
	}
	want := &recipe{
		goBuild: []string{"build", "-trimpath", "-ldflags", "-s -w -X main.version=v1.2.3", "./cmd/webhook"},
		goEnv:   []string{"CGO_ENABLED=0"},
		output:  "/out/webhook",
		copies: []copyStep{
			{from: caBundle, to: "/etc/ssl/certs/ca-certificates.crt"},
			{from: "/out/webhook", to: "/webhook"},
		},
		user: "65532:65532", entrypoint: []string{"/webhook"}, ports: []string{"10250/tcp", "53/udp"},
		labels: map[string]string{"org.opencontainers.image.title": "control plane", "org.opencontainers.image.licenses": "Apache-2.0"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	def, err := parseDockerfile("Dockerfile", strings.NewReader(goodDockerfile), nil)
	if err != nil || def.goBuild[3] != "-s -w -X main.version=dev" {
		t.Errorf("the default of VERSION: %v, %v", def, err)
	}
}

func TestParseDockerfileRefuses(t *testing.T) {
	_, lastStage, found := strings.Cut(goodDockerfile, "FROM scratch")
	if lastStage = "FROM scratch" + lastStage; !found {
		t.Fatal("the good Dockerfile has no last stage")
	}
	for _, tc := range []struct{ name, old, new, want string }{
		{"unknown instruction", "USER 65532:65532", "HEALTHCHECK NONE", "Dockerfile:15: HEALTHCHECK is not an instruction that this builder carries out in this stage (it knows COPY, ENTRYPOINT, EXPOSE, FROM, LABEL, USER)"},
		{"run in the last stage", "USER 65532:65532", "RUN adduser x", "Dockerfile:15: RUN is not an instruction"},
		{"another base", "FROM scratch", "FROM alpine", "Dockerfile:10: FROM alpine: want two stages"},
		{"third stage", "USER 65532:65532", "FROM scratch", "Dockerfile:15: FROM scratch: want two stages"},
		{"another command", "RUN go mod download", "RUN apt-get update", "Dockerfile:5: RUN apt-get update: this builder runs only go mod download and go build"},
		{"chained command", "./cmd/webhook\n", "./cmd/webhook && true\n", "&&: one command per RUN"},
		{"relative output", "-o /out/webhook", "-o webhook", "want -o with an absolute path"},
		{"no output", "-o /out/webhook", "", "want -o with an absolute path"},
		{"two builds", "RUN go mod download", "RUN go build -o /x .", "a second go build"},
		{"copy from the context", "COPY --from=build /out/webhook /webhook", "COPY webhook /webhook", "Dockerfile:14: COPY webhook /webhook: want COPY --from=build SOURCE TARGET"},
		{"copy of something else", "COPY --from=build /out/webhook /webhook", "COPY --from=build /etc/passwd /etc/passwd", "this builder has from the build stage only /out/webhook and " + caBundle},
		{"shell form", `ENTRYPOINT ["/webhook"]`, "ENTRYPOINT /webhook", "want the exec form"},
		{"no entrypoint", `ENTRYPOINT ["/webhook"]`, "", "Dockerfile: its last stage has no ENTRYPOINT"},
		{"unknown variable", "${VERSION}", "${COMMIT}", "$COMMIT is no ARG or ENV of this file"},
		{"open quote", `${VERSION}"`, "${VERSION}", "is not closed"},
		{"command substitution", "${VERSION}", "`git describe`", "` is more shell than this builder knows"},
		{"label without value", "licenses=Apache-2.0", "licenses", "want key=value"},
		{"no last stage", lastStage, "", "Dockerfile: its last stage is not FROM scratch"},
		{"no build", `RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/webhook ./cmd/webhook`, "", "this builder has from the build stage only"},
		{"open end", `ENTRYPOINT ["/webhook"]`, `ENTRYPOINT \`, "the last line says that it goes on"},
		{"before FROM", "# a comment", "RUN go mod download", "Dockerfile:1: RUN comes before the first FROM"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := strings.Replace(goodDockerfile, tc.old, tc.new, 1)
			if text == goodDockerfile {
				t.Fatal("the case changes nothing")
			}
			_, err := parseDockerfile("Dockerfile", strings.NewReader(text), nil)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want ... %s ...", err, tc.want)
			}
		})
	}
}

// TestRepositoryDockerfiles holds the project's Dockerfiles to what the reader knows and to
// what every image of the product must have.
func TestRepositoryDockerfiles(t *testing.T) {
	root := repositoryRoot(t)
	for _, src := range imageSources {
		t.Run(src.name, func(t *testing.T) {
			f, err := os.Open(filepath.Join(root, src.dockerfile))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			r, err := parseDockerfile(src.dockerfile, f, map[string]string{"VERSION": "v0"})
			if err != nil {
				t.Fatal(err)
			}
			if r.user != "65532:65532" {
				t.Errorf("USER %q: runAsNonRoot needs the numeric 65532:65532", r.user)
			}
			if len(r.entrypoint) != 1 || r.entrypoint[0] != "/"+src.name {
				t.Errorf("ENTRYPOINT %q, want /%s", r.entrypoint, src.name)
			}
			if src.context == "." && (len(r.copies) != 2 || r.copies[0].from != caBundle) {
				t.Errorf("it copies %v, want the CA bundle and the binary", r.copies)
			}
		})
	}
}

func repositoryRoot(t *testing.T) string {
	t.Helper()
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	root, err := findRoot(wd)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func FuzzParseDockerfile(f *testing.F) {
	f.Add(goodDockerfile)
	f.Add("FROM golang:1 AS b\nRUN go build -o /a $X${Y")
	f.Fuzz(func(t *testing.T, text string) {
		r, err := parseDockerfile("Dockerfile", strings.NewReader(text), nil)
		if (r == nil) == (err == nil) {
			t.Errorf("got %v and %v", r, err)
		}
	})
}
