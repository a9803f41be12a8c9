"""The socket loop, its lanes, and what keeps watch over clients."""
