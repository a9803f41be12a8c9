"""From what was measured to a result, and a result as tables."""
