package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

const (
	// configFlag names the file; it is the one flag that cannot stand in it.
	configFlag = "config"
	// envPrefix begins the environment variables that stand for flags: MYSOCKET_EDGE_API_ADDRESS for --api-address.
	envPrefix = "MYSOCKET_EDGE_"

	maxConfigFile = 1 << 20
)

// settings are the layers below the command line: for whatever flags a set has, the environment, then a YAML file whose keys are
// the flags' names. They are read without knowing what any flag is for, so that a new flag can be given in all three ways.
type settings struct {
	fs *flag.FlagSet
	// origin says where the value of a flag is from; flags of the command line are not in it.
	origin map[string]string
	given  map[string]bool
	errs   []error
}

// parseLayers reads the command line, the environment and the file that one of the two names, in this order of precedence. All
// that is wrong is printed, each in one sentence with its place.
func parseLayers(fs *flag.FlagSet, args, environ []string, stderr io.Writer) (s *settings, code int, ok bool) {
	s = &settings{fs: fs, origin: map[string]string{}, given: map[string]bool{}}
	path := fs.String(configFlag, "", "YAML `file` with flags: their names without dashes are its keys; flags and the environment come before it")
	if code, ok := parse(fs, args, stderr); !ok {
		return nil, code, false
	}
	fs.Visit(func(f *flag.Flag) { s.given[f.Name] = true })
	s.environment(environ)
	if *path != "" {
		s.file(*path)
	}
	for _, err := range s.errs {
		_, _ = fmt.Fprintf(stderr, "%s: %v\n", fs.Name(), err)
	}
	if len(s.errs) > 0 {
		return nil, 2, false
	}
	return s, 0, true
}

// place names a flag by where its value is from, for a sentence that begins with the flag's name.
func (s *settings) place(sentence string) string {
	name := sentence
	if end := strings.IndexAny(sentence, " :"); end > 0 {
		name = sentence[:end]
	}
	if where, ok := s.origin[name]; ok {
		return where + ": " + sentence
	}
	return "--" + sentence
}

func (s *settings) fail(format string, args ...any) {
	s.errs = append(s.errs, fmt.Errorf(format, args...))
}

// ofCluster are the variables that Kubernetes puts into every pod for a Service named mysocket-edge, or mysocket-edge-something.
var (
	ofCluster     = regexp.MustCompile(`_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)
	ofClusterPort = regexp.MustCompile(`^(tcp|udp|sctp)://`)
)

func (s *settings) environment(environ []string) {
	environ = slices.Clone(environ)
	slices.Sort(environ)
	for _, variable := range environ {
		name, value, _ := strings.Cut(variable, "=")
		rest, ours := strings.CutPrefix(name, envPrefix)
		if !ours {
			continue
		}
		f := s.fs.Lookup(strings.ToLower(strings.ReplaceAll(rest, "_", "-")))
		if f == nil || rest != strings.ToUpper(rest) {
			if !ofCluster.MatchString(name) && !(strings.HasSuffix(name, "_PORT") && ofClusterPort.MatchString(value)) {
				s.fail("the environment variable %s stands for no flag", name)
			}
			continue
		}
		s.set(f, name, value)
	}
}

func (s *settings) file(path string) {
	root, err := readConfig(path)
	if err != nil {
		s.errs = append(s.errs, err)
		return
	}
	if root == nil {
		return
	}
	if root.Kind != yaml.MappingNode {
		s.fail("%s:%d: the file must be lines of the form \"flag: value\"", path, root.Line)
		return
	}
	seen := map[string]int{}
	for i := 0; i < len(root.Content); i += 2 {
		key, value := root.Content[i], resolve(root.Content[i+1])
		where := fmt.Sprintf("%s:%d", path, key.Line)
		name := key.Value
		f := s.fs.Lookup(name)
		first, duplicate := seen[name]
		switch {
		case key.Kind != yaml.ScalarNode || f == nil:
			s.fail("%s: there is no flag %q", where, name)
			continue
		case name == configFlag:
			s.fail("%s: %s can't be given in the file that it names", where, name)
			continue
		case duplicate:
			s.fail("%s: %s is given twice; it is in line %d already", where, name, first)
			continue
		}
		seen[name] = key.Line
		s.fromYAML(f, where, value)
	}
}

// readConfig returns the top of the one document in a file, nil if there is none.
func readConfig(path string) (*yaml.Node, error) {
	f, err := os.Open(path) // #nosec G304 -- the operator names the file
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxConfigFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxConfigFile)
	}
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var document, more yaml.Node
	if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
		return nil, nil //nolint:nilnil // an empty file says nothing
	} else if err != nil {
		return nil, inFile(path, err)
	}
	if err := decoder.Decode(&more); err == nil {
		return nil, fmt.Errorf("%s:%d: a second document begins; one is allowed", path, more.Line)
	} else if !errors.Is(err, io.EOF) {
		return nil, inFile(path, err)
	}
	root := resolve(document.Content[0])
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil, nil //nolint:nilnil // a file of comments
	}
	return root, nil
}

var yamlLine = regexp.MustCompile(`^yaml: line ([0-9]+): (.*)$`)

func inFile(path string, err error) error {
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
		return fmt.Errorf("%s:%s: %s", path, m[1], m[2])
	}
	return fmt.Errorf("%s: %w", path, err)
}

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// fromYAML sets a flag to a scalar, or to the scalars of a list, which a flag that may be given several times gets one by one and any
// other with commas between them.
func (s *settings) fromYAML(f *flag.Flag, where string, value *yaml.Node) {
	items := []*yaml.Node{value}
	if value.Kind == yaml.SequenceNode {
		items = value.Content
	}
	var texts []string
	for _, item := range items {
		text, err := scalar(f, resolve(item))
		if err != nil {
			s.fail("%s: %s %w", where, f.Name, err)
			return
		}
		texts = append(texts, text)
	}
	if _, single := kindOf(f); single && value.Kind == yaml.SequenceNode {
		texts = []string{strings.Join(texts, ",")}
	}
	s.set(f, where, texts...)
}

// scalar returns a value as the flag takes it. YAML has types, and what it takes for another type than the flag's is a mistake.
func scalar(f *flag.Flag, n *yaml.Node) (string, error) {
	if n.Kind != yaml.ScalarNode {
		return "", errors.New("must have a plain value")
	}
	types := map[string]string{
		"!!null": "nothing", "!!bool": "a boolean", "!!int": "a number", "!!float": "a number", "!!timestamp": "a date", "!!binary": "binary",
	}
	is, odd := types[n.Tag]
	kind, _ := kindOf(f)
	switch {
	case n.Tag == "!!null":
		return "", errors.New("has no value")
	case kind == kindBool && n.Tag != "!!bool":
		return "", fmt.Errorf("is %q; it must be true or false, without quotes", n.Value)
	case kind == kindText && odd:
		return "", fmt.Errorf("is %s, which YAML takes for %s; write it in quotes", n.Value, is)
	}
	return n.Value, nil
}

type kind int

const (
	kindText kind = iota
	kindBool
	kindOther
)

// kindOf says what values a flag has, and whether it has only one: those of the flag package do.
func kindOf(f *flag.Flag) (k kind, single bool) {
	getter, ok := f.Value.(flag.Getter)
	if !ok {
		return kindOther, false
	}
	switch getter.Get().(type) {
	case bool:
		return kindBool, true
	case string:
		return kindText, true
	}
	return kindOther, true
}

// check says what a value must be that is not of the flag's type. Values that only a flag itself understands are not checked.
func check(f *flag.Flag, value string) error {
	getter, ok := f.Value.(flag.Getter)
	if !ok {
		return nil
	}
	var err error
	want := ""
	switch getter.Get().(type) {
	case bool:
		_, err = strconv.ParseBool(value)
		want = "true or false"
	case time.Duration:
		_, err = time.ParseDuration(value)
		want = "a time such as 500ms, 10s or 5m"
	case int, int64:
		_, err = strconv.ParseInt(value, 0, 64)
		want = "a whole number"
	case uint, uint64:
		_, err = strconv.ParseUint(value, 0, 64)
		want = "a whole number that is not negative"
	case float64:
		_, err = strconv.ParseFloat(value, 64)
		want = "a number"
	}
	if err != nil {
		return fmt.Errorf("is %q; it must be %s", value, want)
	}
	return nil
}

// set gives a flag its value, unless a layer above has done so. It is checked in any case: a mistake should not wait until the flag on the
// command line is gone.
func (s *settings) set(f *flag.Flag, where string, values ...string) {
	for _, value := range values {
		if err := check(f, value); err != nil {
			s.fail("%s: %s %w", where, f.Name, err)
			return
		}
	}
	if s.given[f.Name] {
		return
	}
	s.given[f.Name] = true
	s.origin[f.Name] = where
	for _, value := range values {
		if err := f.Value.Set(value); err != nil {
			s.fail("%s: %s is %q: %w", where, f.Name, value, err)
			return
		}
	}
}
