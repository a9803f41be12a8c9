"""A worker's cache as the server sees it: gather from it, scatter into it."""
