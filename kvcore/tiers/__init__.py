"""Where chunks go beyond L1: one small contract, and the stores behind it."""
