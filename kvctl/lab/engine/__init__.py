"""A played engine: its scheduler, its batch in time, a request's life."""
