package store

import (
	"crypto/rand"
	"fmt"
	"math/big"
)

// The words of public names. Plain, inoffensive, and short enough that a name can be read out over a telephone.
var (
	adjectives = []string{
		"amber", "ancient", "autumn", "bold", "brave", "bright", "calm", "careful", "cheerful", "clear", "clever", "cool",
		"cosmic", "crimson", "curious", "dapper", "dawn", "eager", "early", "easy", "elegant", "fancy", "fast", "fearless",
		"gentle", "glad", "golden", "grand", "green", "happy", "hidden", "honest", "humble", "icy", "jolly", "keen",
		"kind", "late", "lively", "lucky", "mellow", "merry", "misty", "modest", "noble", "patient", "polite", "proud",
		"quick", "quiet", "rapid", "royal", "shiny", "silent", "silver", "smooth", "snowy", "sunny", "swift", "tidy",
		"tranquil", "vivid", "warm", "wise",
	}
	nouns = []string{
		"badger", "bay", "beacon", "bird", "breeze", "bridge", "brook", "canyon", "castle", "cedar", "cloud", "comet",
		"coral", "creek", "dolphin", "eagle", "falcon", "field", "fjord", "flower", "forest", "fox", "garden", "glacier",
		"grove", "harbor", "hare", "heron", "hill", "island", "lagoon", "lake", "lantern", "leaf", "maple", "meadow",
		"meteor", "moon", "morning", "mountain", "nebula", "ocean", "orchid", "otter", "owl", "panda", "peak", "pebble",
		"pine", "planet", "pond", "prairie", "rain", "reef", "river", "robin", "sea", "shadow", "sparrow", "star",
		"stone", "thunder", "tulip", "valley",
	}
)

// randomLabel makes the first label of a public name, adjective-noun-NNNN. There are about 41 million; the caller checks
// that a name is free.
func randomLabel() string {
	return fmt.Sprintf("%s-%s-%04d", adjectives[randomInt(len(adjectives))], nouns[randomInt(len(nouns))], randomInt(10000))
}

// randomInt is uniform in [0, n).
func randomInt(n int) int {
	v, err := rand.Int(rand.Reader, big.NewInt(int64(n)))
	if err != nil {
		// crypto/rand does not fail on any supported system; there is nothing sensible to go on with.
		panic(fmt.Sprintf("store: no randomness: %v", err))
	}
	return int(v.Int64())
}
