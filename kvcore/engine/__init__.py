"""Engine: registered caches, sessions, lookups, leases and transfers over L1."""
