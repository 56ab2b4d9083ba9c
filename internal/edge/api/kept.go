package api

import (
	"errors"
	"net/http"
	"strings"
	"syscall"
	"time"
)

// retryKept is when a client whose object could not be kept may ask again: somebody has to make room first.
const retryKept = 30 * time.Second

// notKept is the answer for an error of the disk that the state is on; nil for other errors. Nothing was changed then.
func notKept(err error) *refusal {
	var ref *refusal
	switch {
	case isOneOf(err, syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG):
		ref = refuse(http.StatusInsufficientStorage, "the edge has no room to keep this; nothing was changed")
	case isOneOf(err, syscall.EROFS, syscall.EIO):
		ref = refuse(http.StatusServiceUnavailable, "the edge can't write to its disk at the moment; nothing was changed")
	default:
		return nil
	}
	ref.retryAfter = retryKept
	return ref
}

func isOneOf(err error, numbers ...syscall.Errno) bool {
	for _, number := range numbers {
		// Of a failure to make its file larger, bbolt keeps only the words.
		if errors.Is(err, number) || strings.HasSuffix(err.Error(), ": "+number.Error()) {
			return true
		}
	}
	return false
}
