"""Results and comparisons as sentences, tables, Markdown and JUnit XML."""
