"""A real vLLM in place of the played engines."""
