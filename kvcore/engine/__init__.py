"""Instances, sessions, and the requests that move and find KV."""
