"""Share the paged KV cache of a torch model.

Its shape is `[2, layers, blocks, slots, heads, dim]`: K and V first.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from local_server import start_server

import kvcore

LAYERS, BLOCKS, SLOTS, HEADS, DIM = 4, 64, 16, 2, 64
SHAPE = (2, LAYERS, BLOCKS, SLOTS, HEADS, DIM)


def describe(cache: torch.Tensor) -> kvcore.CacheGroup:
    """Describe a cache to the server; strides are in bytes."""
    size = cache.element_size()
    strides = tuple(stride * size for stride in cache.stride())
    view = kvcore.TensorView(0, 0, tuple(cache.shape), strides)
    return kvcore.CacheGroup("KLNSHD", "bfloat16", SLOTS, (view,))


def main() -> None:
    """Store 512 tokens, overwrite their blocks, retrieve them into others."""
    tokens = np.arange(512, dtype=np.uint32)
    memory = kvcore.Segment.create(
        f"example-torch-{os.getpid()}", 2 * int(np.prod(SHAPE)), touch=True
    )
    with start_server() as server, kvcore.KVClient(server) as client, memory:
        cache = torch.from_numpy(memory.array).view(torch.bfloat16).view(SHAPE)
        handle = kvcore.PosixShm(memory.name, 0, memory.num_bytes)
        client.register_kv_cache(
            kvcore.RegisterKVCache(
                "rank-0", "engine", "model@1", 1, 0, (handle,), (describe(cache),)
            )
        )
        cache.copy_(torch.randn(SHAPE, dtype=torch.float32))
        expected = cache[:, :, :32].clone()
        session = kvcore.SessionKey("engine", "request-1")
        print(client.store(session, "rank-0", 0, 512, [range(32)], tokens))

        cache[:, :, :32] = 0
        found = client.lookup(session, "model@1", 1, tokens).num_tokens
        client.retrieve(session, "rank-0", 0, found, [range(32, 64)], tokens)
        print(found, "tokens, equal:", torch.equal(cache[:, :, 32:], expected))
        del cache


if __name__ == "__main__":
    main()
