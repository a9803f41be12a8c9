"""One self-contained HTML page of results: what it says, and how it is drawn."""
