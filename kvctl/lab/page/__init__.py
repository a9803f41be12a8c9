"""A self-contained HTML page of results."""
