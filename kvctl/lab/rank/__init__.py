"""Simulated ranks: their caches, byte checks, and isolated calls."""
