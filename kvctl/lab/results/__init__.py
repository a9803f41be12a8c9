"""From what was measured to a result."""
