"""Host memory: the arena, L1 on it, leases, eviction."""
