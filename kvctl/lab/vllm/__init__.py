"""Scenarios with real vLLM engines."""
