package api

import (
	"crypto/sha256"
	"math"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/addr"
)

const (
	// An address may fail maxFailures times in a row, and once more each failureRefill after that.
	maxFailures   = 10
	failureRefill = 6 * time.Second
	maxAddresses  = 10_000
	// All addresses together may fail maxAccountFailures times in a row for one account, and once more each failureRefill: who has
	// many addresses, or a whole network, is no better off. Addresses that logged in to the account before don't count, or
	// a guesser could lock its owner out.
	maxAccountFailures = 30
	// An account may send requestBurst requests at once, and one more each requestRefill after that. A control plane of ours sends
	// 20 a second at most, those for its sidecars' certificates among them.
	requestBurst  = 5000
	requestRefill = 10 * time.Millisecond
	// maxRates is beyond how many accounts those that have all their requests again are forgotten.
	maxRates = 1024
	// maxFamiliar are the addresses that are remembered of one account.
	maxFamiliar = 16
)

// throttle bounds how often something may be done, by a key such as an address. Of logins only wrong ones count, so that a
// control plane behind the same address as a guesser only suffers while guessing goes on.
type throttle struct {
	now     func() time.Time
	burst   float64       // how often in a row
	every   time.Duration // once more, after that
	most    int           // keys that are remembered; those that have all their tries again are forgotten
	refusal string        // the sentence

	mu      sync.Mutex
	buckets map[string]*bucket
}

type bucket struct {
	// tokens are the tries that are left at time at.
	tokens float64
	at     time.Time
}

func newThrottle(now func() time.Time, refusal string, burst float64, every time.Duration, most int) *throttle {
	return &throttle{now: now, burst: burst, every: every, most: most, refusal: refusal, buckets: map[string]*bucket{}}
}

// attempt is one try that is under way. It holds a token, so that many tries at once are not a way around the bound.
type attempt struct {
	throttle *throttle
	key      string
	done     bool
}

func (t *throttle) begin(key string) (*attempt, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	b := t.buckets[key]
	if b == nil {
		t.makeRoom(now)
		b = &bucket{tokens: t.burst, at: now}
		t.buckets[key] = b
	}
	b.refill(now, t.burst, t.every)
	if b.tokens < 1 {
		wait := time.Duration((1 - b.tokens) * float64(t.every))
		return nil, &refusal{status: http.StatusTooManyRequests, message: t.refusal, retryAfter: wait + time.Second}
	}
	b.tokens--
	return &attempt{throttle: t, key: key}, nil
}

// refill gives back what the time since the last call has earned. A clock that went back starts anew from where it is.
func (b *bucket) refill(now time.Time, burst float64, every time.Duration) {
	if elapsed := now.Sub(b.at); elapsed > 0 {
		b.tokens = min(burst, b.tokens+float64(elapsed)/float64(every))
	}
	b.at = now
}

// makeRoom forgets keys that have all their tries again, and if that is not enough, any: the map must not grow
// without end. The caller holds mu.
func (t *throttle) makeRoom(now time.Time) {
	if len(t.buckets) < t.most {
		return
	}
	for key, b := range t.buckets {
		if b.refill(now, t.burst, t.every); b.tokens >= t.burst {
			delete(t.buckets, key)
		}
	}
	// Many at once, so that those who make them up don't have us look at all of them each time.
	for key := range t.buckets {
		if len(t.buckets) < t.most-t.most/16 {
			return
		}
		delete(t.buckets, key)
	}
}

func (a *attempt) succeeded() {
	if a == nil || a.done {
		return
	}
	a.done = true
	a.throttle.mu.Lock()
	defer a.throttle.mu.Unlock()
	if b := a.throttle.buckets[a.key]; b != nil {
		b.tokens = min(a.throttle.burst, b.tokens+1)
	}
}

func (a *attempt) failed() {
	if a != nil {
		a.done = true
	}
}

// newRates bounds the requests of each account, so that none takes the disk and the processor from the others.
func newRates(now func() time.Time) *throttle {
	return newThrottle(now, "too many requests of this account; try again later", requestBurst, requestRefill, maxRates)
}

// logins bounds wrong passwords by the address that they come from and by the account that they are for.
type logins struct {
	addresses *throttle
	accounts  *throttle // by id; there are no more of them than accounts
	unknown   *throttle // by a hash of the e-mail address, so that an account that is not there is throttled like one that is

	mu       sync.Mutex
	familiar map[string][]netip.Addr // by account: whence it was logged in to, newest last
}

func newLogins(now func() time.Time) *logins {
	const ofAccount = "too many failed logins to this account; try again later"
	return &logins{
		addresses: newThrottle(now, "too many failed logins or new accounts from this address; try again later", maxFailures, failureRefill, maxAddresses),
		accounts:  newThrottle(now, ofAccount, maxAccountFailures, failureRefill, math.MaxInt),
		unknown:   newThrottle(now, ofAccount, maxAccountFailures, failureRefill, maxAddresses),
		familiar:  map[string][]netip.Addr{},
	}
}

// account begins an attempt to log in to an account. It is nil, which is fine, for an address that is familiar.
func (l *logins) account(userID, remote string) (*attempt, error) {
	l.mu.Lock()
	known := slices.Contains(l.familiar[userID], hostOf(remote))
	l.mu.Unlock()
	if known {
		return nil, nil //nolint:nilnil // see above
	}
	return l.accounts.begin(userID)
}

// noAccount is account for an e-mail address that has none.
func (l *logins) noAccount(email string) (*attempt, error) {
	sum := sha256.Sum256([]byte(strings.ToLower(strings.TrimSpace(email))))
	return l.unknown.begin(string(sum[:]))
}

// welcome makes an address familiar.
func (l *logins) welcome(userID, remote string) {
	host := hostOf(remote)
	l.mu.Lock()
	defer l.mu.Unlock()
	list := slices.DeleteFunc(l.familiar[userID], func(a netip.Addr) bool { return a == host })
	list = append(list, host)
	l.familiar[userID] = list[max(0, len(list)-maxFamiliar):]
}

// hostOf is the host that an address such as 192.0.2.7:1234 is of.
func hostOf(remote string) netip.Addr { return addr.Host(addr.Parse(remote).Addr()) }
