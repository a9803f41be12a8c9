"""Results of runs: the saved format, and how it is computed from measurements."""
