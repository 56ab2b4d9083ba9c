package api

import "github.com/mysocketio/mysocket-injector/internal/edge/store"

// checkSticky checks the tag by which a socket asks for sticky visitors, which is the only one that means something here.
func checkSticky(tags map[string]string, kind store.SocketType) error {
	value, asked := tags[store.StickyTag]
	switch {
	case !asked:
		return nil
	case value != store.StickyCookie:
		return badRequest("tags: %s is %q; allowed: %s", store.StickyTag, truncate(value, 50), store.StickyCookie)
	case !kind.Web():
		return badRequest("tags: %s is for http and https sockets; this one is %s", store.StickyTag, kind)
	}
	return nil
}
