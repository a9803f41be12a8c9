"""Workloads: prompts, arrival times, and simulations of caches."""
