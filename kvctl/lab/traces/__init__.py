"""Readers of request traces, their profile, and the catalogue of public ones."""
