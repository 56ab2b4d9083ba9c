package metrics

import "github.com/prometheus/client_golang/prometheus"

// Reasons why an SSH connection was refused, or closed after its login.
const (
	SSHCrowd   = "crowd"   // too many had not logged in
	SSHAddress = "address" // too many of its address
	SSHAccount = "account" // too many of its account, or too many of the account's logins
	SSHLogin   = "login"   // no valid key or certificate, or none in time
	SSHFlood   = "flood"   // closed, for a flood of messages
)

func newSSHRefused() *prometheus.CounterVec {
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "mysocket_edge_ssh_refused_total", Help: "SSH connections that were refused, or closed after their login, by reason.",
	}, []string{"reason"})
	for _, reason := range []string{SSHCrowd, SSHAddress, SSHAccount, SSHLogin, SSHFlood} {
		refused.WithLabelValues(reason)
	}
	return refused
}

// SSHRefused counts an SSH connection that was refused or closed.
func (m *Metrics) SSHRefused(reason string) { m.sshRefused.WithLabelValues(reason).Inc() }
