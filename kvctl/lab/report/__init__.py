"""A result as tables, and in a sentence."""
