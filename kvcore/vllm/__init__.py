"""The adapter between vLLM and the server.

Only `connector` imports vLLM; the rest is plain Python, so that it can be tested and
understood without one. docs/vllm.md tells how the pieces work together.
"""
