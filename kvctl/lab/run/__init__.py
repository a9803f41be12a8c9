"""One run: its processes, what strikes them, what is measured after."""
