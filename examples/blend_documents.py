"""Reuse a document's KV at another position of a prompt."""

from __future__ import annotations

import os

import numpy as np
from local_server import start_server

import kvcore

LAYERS, SLOTS, HEADS, DIM = 2, 2048, 2, 64
SHAPE = (2, LAYERS, SLOTS, HEADS * DIM)


def main() -> None:
    """Store a document once; find and retrieve it behind other text."""
    rng = np.random.default_rng(0)
    document = rng.integers(0, 32_000, 512, dtype=np.uint32)
    prompt = np.concatenate((rng.integers(0, 32_000, 100, dtype=np.uint32), document))
    memory = kvcore.Segment.create(
        f"example-blend-{os.getpid()}", 4 * int(np.prod(SHAPE)), touch=True
    )
    with (
        start_server("--engine", "blend") as server,
        kvcore.KVClient(server) as client,
        memory,
    ):
        buffer = memory.array.view(np.float32).reshape(SHAPE)
        blend = kvcore.BlendClient(client)
        blend.register(
            kvcore.CBRegisterKVCache(
                instance_id="worker",
                engine_id="engine",
                model="model@1",
                world_size=1,
                rank=0,
                handle=kvcore.PosixShm(memory.name, 0, memory.num_bytes),
                shape=SHAPE,
                dtype="float32",
                rope=kvcore.Rope(theta=10_000.0, head_dim=DIM, rotary_dim=DIM),
            )
        )
        computed = rng.normal(size=(2, LAYERS, 512, HEADS * DIM)).astype(np.float32)
        buffer[:, :, :512] = computed
        print(blend.store_pre_computed("worker", 0, document))

        session = kvcore.SessionKey("engine", "request-1")
        found = blend.lookup_pre_computed(session, "model@1", 1, prompt)
        print(f"{found.num_tokens} of {len(prompt)} tokens found:", found.ranges)

        # The prompt's tokens lie in the slots from 1,000 on; values do not rotate.
        blend.retrieve_pre_computed(
            session, "worker", 1000, ranges=found.ranges, rotate_keys=True
        )
        values = buffer[1, :, 1100 : 1100 + 512]
        print("values equal:", np.array_equal(values, computed[1]))
        print("keys rotated:", not np.array_equal(buffer[0, :, 1100:1612], computed[0]))


if __name__ == "__main__":
    main()
