"""Comparison of two sides of runs: settings, versions or systems."""
