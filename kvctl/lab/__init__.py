"""The laboratory: engines that are played, load, and what came of it."""
