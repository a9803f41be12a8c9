"""Systems under test: kvctl's own server, LMCache, and Valkey."""
