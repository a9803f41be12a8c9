"""Simulated engines: scheduler, request lifecycle, and a time model of the batch."""
