"""The command line and the laboratory."""
