"""Systems that a load can be played against: ours, and others beside it."""
