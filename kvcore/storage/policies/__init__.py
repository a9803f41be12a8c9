"""Orders of chunks by worth, one a file; the contract is in `storage.eviction`."""
