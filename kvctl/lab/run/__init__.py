"""The driver of a run: processes, load, fault injection, and measurements after it."""
