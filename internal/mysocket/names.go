package mysocket

import (
	"crypto/sha256"
	"encoding/base32"
	"regexp"
	"strings"
)

// The border0 dialect takes lower-case letters, digits and dashes in names, and they become part of DNS names, so we keep
// to what a DNS label may be. Our names have more, as in "k8s shop.web". They are mapped so that no two of them meet:
//
//	"."  becomes "--" and " " becomes "---"                     k8s shop.web  k8s---shop--web
//	if the name is made of such words, as ours mostly are
//	any other name (capitals, other characters, dashes side by  Shop Web      shop-web----<16 characters of its SHA-256>
//	side, too long): what is readable of it, "----" and a hash
//
// Runs of one to three dashes tell the first form's characters apart, a run of four the second form from the first. The
// first can be read back; for the second, the full name goes into display_name.
const (
	maxLabel   = 63
	hashMark   = "----"
	hashLength = 16 // characters of base32: 80 bits, so that nobody finds a second name for a given hash
)

var (
	// spelledName is a name whose dots, spaces and dashes stand alone between words.
	spelledName = regexp.MustCompile(`^[a-z0-9]+([-. ][a-z0-9]+)*$`)
	// border0Name is what the dialect allows.
	border0Name = regexp.MustCompile(`^[a-z0-9-]+$`)

	spell  = strings.NewReplacer(".", "--", " ", "---")
	noWord = regexp.MustCompile(`[^a-z0-9]+`)
	dashes = regexp.MustCompile(`-+`)
)

// encodeName maps a name to the border0 dialect.
func encodeName(name string) string {
	if spelledName.MatchString(name) {
		if s := spell.Replace(name); len(s) <= maxLabel && !reservedLabel(s) {
			return s
		}
	}
	readable := strings.Trim(noWord.ReplaceAllString(strings.ToLower(name), "-"), "-")
	if len(readable) < 3 { // the mark must not stand where xn-- does
		readable = strings.TrimRight("name-"+readable, "-")
	}
	readable = strings.TrimRight(readable[:min(len(readable), maxLabel-len(hashMark)-hashLength)], "-")
	sum := sha256.Sum256([]byte(name))
	return readable + hashMark + strings.ToLower(base32.StdEncoding.EncodeToString(sum[:]))[:hashLength]
}

// reservedLabel tells whether DNS keeps a label for itself, as those that begin with xn--.
func reservedLabel(s string) bool { return len(s) >= 4 && s[2:4] == "--" }

// decodeName tells which of our names a name of the border0 dialect stands for. It is empty for one that is nobody's: to
// show it as it is would let a Service that is called so claim another's socket.
func decodeName(name, display string) string {
	if !border0Name.MatchString(name) {
		// Not of this dialect: the socket was made in the other one, at an edge that speaks both.
		return name
	}
	spelled := dashes.ReplaceAllStringFunc(name, func(run string) string {
		switch len(run) {
		case 2:
			return "."
		case 3:
			return " "
		}
		return run
	})
	for _, candidate := range []string{spelled, display} {
		if candidate != "" && encodeName(candidate) == name {
			return candidate
		}
	}
	return ""
}
