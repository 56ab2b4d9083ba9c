package cluster

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// recipe is what a Dockerfile of this repository says: the go command of its build stage and
// the content of its final stage, which begins at scratch.
type recipe struct {
	goBuild    []string // arguments of go, without -o and its value
	goEnv      []string
	output     string // where the build stage puts the binary
	copies     []copyStep
	user       string
	entrypoint []string
	labels     map[string]string
	ports      []string
}

type copyStep struct{ from, to string }

// The instructions that may stand in each stage. The reader is strict: an instruction it does
// not carry out would make an image that differs from what docker makes of the same file.
var (
	buildInstructions = []string{"ARG", "COPY", "ENV", "FROM", "RUN", "WORKDIR"}
	finalInstructions = []string{"COPY", "ENTRYPOINT", "EXPOSE", "FROM", "LABEL", "USER"}
)

// dockerfileReader carries the state of one reading.
type dockerfileReader struct {
	args  map[string]string // ARG and ENV values, overridden by the caller's
	given map[string]string
	stage string // name of the stage that is being read: "" before the first
	built string // name of the build stage
	final bool
	out   recipe
}

// parseDockerfile reads a Dockerfile of two stages: one that runs a go build, and a last one
// "FROM scratch" that takes files from it. name is for error messages; args override the ARG
// defaults.
func parseDockerfile(name string, r io.Reader, args map[string]string) (*recipe, error) {
	d := &dockerfileReader{args: map[string]string{}, given: args, out: recipe{labels: map[string]string{}}}
	scanner := bufio.NewScanner(r)
	line, first, pending := 0, 0, ""
	for scanner.Scan() {
		line++
		text := strings.TrimSpace(scanner.Text())
		if text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		if pending == "" {
			first = line
		}
		if more, ok := strings.CutSuffix(text, `\`); ok {
			pending += strings.TrimSpace(more) + " "
			continue
		}
		if err := d.instruction(pending + text); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, first, err)
		}
		pending = ""
	}
	if err := scanner.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if pending != "" {
		return nil, fmt.Errorf("%s:%d: the last line says that it goes on", name, first)
	}
	switch {
	case !d.final:
		return nil, fmt.Errorf("%s: its last stage is not FROM scratch", name)
	case len(d.out.goBuild) == 0:
		return nil, fmt.Errorf("%s: its build stage runs no go build", name)
	case len(d.out.entrypoint) == 0:
		return nil, fmt.Errorf("%s: its last stage has no ENTRYPOINT", name)
	}
	return &d.out, nil
}

func (d *dockerfileReader) instruction(text string) error {
	word, rest, _ := strings.Cut(text, " ")
	word, rest = strings.ToUpper(word), strings.TrimSpace(rest)
	allowed := buildInstructions
	if d.final {
		allowed = finalInstructions
	}
	if !slices.Contains(allowed, word) {
		return fmt.Errorf("%s is not an instruction that this builder carries out in this stage (it knows %s)", word, strings.Join(allowed, ", "))
	}
	if d.stage == "" && word != "FROM" && word != "ARG" {
		return fmt.Errorf("%s comes before the first FROM", word)
	}
	switch word {
	case "FROM":
		return d.from(rest)
	case "ARG", "ENV":
		return d.assign(word, rest)
	case "RUN":
		return d.run(rest)
	case "COPY":
		return d.copyFiles(rest)
	case "USER":
		d.out.user = rest
	case "EXPOSE":
		for _, p := range strings.Fields(rest) {
			if !strings.Contains(p, "/") {
				p += "/tcp"
			}
			d.out.ports = append(d.out.ports, p)
		}
	case "LABEL":
		words, err := d.words(rest)
		if err != nil {
			return err
		}
		for _, w := range words {
			k, v, ok := strings.Cut(w, "=")
			if !ok || k == "" {
				return fmt.Errorf("LABEL %q: want key=value", w)
			}
			d.out.labels[k] = v
		}
	case "ENTRYPOINT":
		if err := json.Unmarshal([]byte(rest), &d.out.entrypoint); err != nil || len(d.out.entrypoint) == 0 {
			return fmt.Errorf("ENTRYPOINT %s: want the exec form, [\"/program\"]: there is no shell in the image", rest)
		}
	}
	return nil
}

func (d *dockerfileReader) from(rest string) error {
	f := strings.Fields(rest)
	switch {
	case d.stage == "" && len(f) == 3 && strings.EqualFold(f[1], "AS") && strings.HasPrefix(f[0], "golang:"):
		d.stage, d.built = f[2], f[2]
		return nil
	case d.stage != "" && !d.final && len(f) == 1 && f[0] == "scratch":
		d.final = true
		return nil
	}
	return fmt.Errorf("FROM %s: want two stages, FROM golang:VERSION AS NAME and then FROM scratch", rest)
}

func (d *dockerfileReader) assign(word, rest string) error {
	words, err := d.words(rest)
	if err != nil {
		return err
	}
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if word == "ENV" && !ok {
			return fmt.Errorf("ENV %s: want NAME=value", w)
		}
		if given, ok := d.given[k]; ok && word == "ARG" {
			v = given
		}
		d.args[k] = v
		if word == "ENV" {
			d.out.goEnv = append(d.out.goEnv, k+"="+v)
		}
	}
	return nil
}

// run accepts "go mod download", which changes nothing of the result, and one "go build".
func (d *dockerfileReader) run(rest string) error {
	words, err := d.words(rest)
	if err != nil {
		return err
	}
	if slices.Equal(words, []string{"go", "mod", "download"}) {
		return nil
	}
	var env []string
	for len(words) > 0 && strings.Contains(words[0], "=") {
		env, words = append(env, words[0]), words[1:]
	}
	if len(words) < 2 || words[0] != "go" || words[1] != "build" {
		return fmt.Errorf("RUN %s: this builder runs only go mod download and go build", rest)
	}
	if len(d.out.goBuild) > 0 {
		return errors.New("a second go build: want one binary per Dockerfile")
	}
	args := words[1:]
	i := slices.Index(args, "-o")
	if i < 0 || i+1 >= len(args) || !path.IsAbs(args[i+1]) {
		return fmt.Errorf("RUN %s: want -o with an absolute path", rest)
	}
	for _, w := range args {
		if slices.Contains([]string{"&&", ";", "|", ">", "||"}, w) {
			return fmt.Errorf("RUN %s: %s: one command per RUN", rest, w)
		}
	}
	d.out.output = args[i+1]
	d.out.goBuild = slices.Concat(args[:i], args[i+2:])
	d.out.goEnv = append(d.out.goEnv, env...)
	return nil
}

func (d *dockerfileReader) copyFiles(rest string) error {
	if !d.final {
		return nil // the sources: the build here runs in the repository itself
	}
	f := strings.Fields(rest)
	if len(f) != 3 || f[0] != "--from="+d.built {
		return fmt.Errorf("COPY %s: want COPY --from=%s SOURCE TARGET", rest, d.built)
	}
	from, to := f[1], f[2]
	if strings.HasSuffix(to, "/") {
		to += path.Base(from)
	}
	if !path.IsAbs(from) || !path.IsAbs(to) {
		return fmt.Errorf("COPY %s: want absolute paths", rest)
	}
	if from != d.out.output && from != caBundle {
		return fmt.Errorf("COPY %s: this builder has from the build stage only %s and %s", rest, d.out.output, caBundle)
	}
	d.out.copies = append(d.out.copies, copyStep{from: from, to: to})
	return nil
}

// words splits a line as a shell does, as far as these files need it: blanks, single and
// double quotes, $NAME and ${NAME} outside of single quotes.
func (d *dockerfileReader) words(s string) ([]string, error) {
	var out []string
	var word strings.Builder
	in, quote := false, byte(0)
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case quote == 0 && (c == ' ' || c == '\t'):
			if in {
				out = append(out, word.String())
			}
			in = false
			word.Reset()
		case quote == 0 && (c == '"' || c == '\''):
			quote, in = c, true
		case c == quote && quote != 0:
			quote = 0
		case c == '$' && quote != '\'':
			name, n := variable(s[i+1:])
			v, ok := d.args[name]
			if !ok {
				return nil, fmt.Errorf("%s: $%s is no ARG or ENV of this file", s, name)
			}
			in = true
			word.WriteString(v)
			i += n
		case c == '\\' || c == '`':
			return nil, fmt.Errorf("%s: %c is more shell than this builder knows", s, c)
		default:
			in = true
			word.WriteByte(c)
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("%s: a %c is not closed", s, quote)
	}
	if in {
		out = append(out, word.String())
	}
	return out, nil
}

// variable reads the name after a dollar sign and returns it with the bytes it took.
func variable(s string) (name string, n int) {
	if inner, ok := strings.CutPrefix(s, "{"); ok {
		if name, _, ok := strings.Cut(inner, "}"); ok {
			return name, len(name) + 2
		}
		return s, len(s)
	}
	for n < len(s) && (s[n] == '_' || s[n] >= '0' && s[n] <= '9' || s[n] >= 'A' && s[n] <= 'Z' || s[n] >= 'a' && s[n] <= 'z') {
		n++
	}
	return s[:n], n
}
