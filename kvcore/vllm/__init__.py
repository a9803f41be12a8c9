"""vLLM KV connector.

Only `connector` imports vLLM; the other modules are plain Python and are tested without
it. docs/vllm.md describes how they work together.
"""
