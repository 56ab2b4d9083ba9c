package registry

// SetName notes what the client of the tunnel calls itself. It is shown to people, and decides nothing.
func (t *Tunnel) SetName(name string) {
	t.registry.mu.Lock()
	defer t.registry.mu.Unlock()
	t.name = name
}

// Name is what the client of the tunnel calls itself; empty when it has not said.
func (t *Tunnel) Name() string {
	t.registry.mu.Lock()
	defer t.registry.mu.Unlock()
	return t.name
}
