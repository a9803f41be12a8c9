"""Readers of request traces, one module a format."""
