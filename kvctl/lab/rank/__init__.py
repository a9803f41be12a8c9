"""A rank of a played engine: its cache, its copies, what it checks."""
