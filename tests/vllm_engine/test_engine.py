"""One engine: aborts, failed loads, cache salts, preemptions, many requests."""

from __future__ import annotations

import pytest

from kvcore.client import KVClient
from tests.system.server_fixture import CHUNK, Server
from tests.vllm_engine.conftest import Serve, Start, generate_sequentially, make_prompt
from tests.vllm_engine.engine import Engine
from tests.vllm_engine.test_models import assert_nothing_held

SHARED = 4 * CHUNK
OPTIONS = {
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 3 << 20,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
}
"""A small engine of 48 blocks, so that requests are preempted. Its prefix cache is
disabled, so that every prompt is looked up on the server."""


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    """The module's server."""
    return serve()


@pytest.fixture(scope="module")
def engine(start: Start, server: Server) -> Engine:
    """The module's engine."""
    return start(address=server.address, **OPTIONS)


def assert_blocks_free(engine: Engine) -> None:
    """Assert that all blocks but the null block are free and no request remains."""
    state = engine.call("settle")
    assert (state["free"], state["requests"]) == (state["all"] - 1, 0)


def test_an_abort_in_the_middle_of_a_load(engine: Engine, server: Server) -> None:
    """Blocks and leases are released, and the prompt is still found."""
    prompt = make_prompt(10 * CHUNK, seed=100)
    expected = generate_sequentially(engine, [prompt])
    assert engine.call("abort_while_loading", prompt=prompt)
    assert_blocks_free(engine)
    assert_nothing_held(server)
    warm = generate_sequentially(engine, [prompt])
    assert warm == {"tokens": expected["tokens"], "cached": [10 * CHUNK]}


def test_a_failed_load_is_computed(engine: Engine, server: Server) -> None:
    """The answer is the same, and later loads are correct."""
    prompt = make_prompt(6 * CHUNK + 9, seed=101)
    expected = generate_sequentially(engine, [prompt])["tokens"]
    engine.call("fail_loads", enabled=True)
    broken = generate_sequentially(engine, [prompt])
    engine.call("fail_loads", enabled=False)
    assert broken["tokens"] == expected
    assert "Recovered from KV load failure" in engine.log_text
    assert_blocks_free(engine)
    warm = generate_sequentially(engine, [prompt])
    assert warm == {"tokens": expected, "cached": [6 * CHUNK]}
    assert_nothing_held(server)


def test_salts_keep_users_apart(engine: Engine) -> None:
    """The same prompt with another salt finds nothing."""
    prompt = make_prompt(2 * CHUNK + 5, seed=102)

    def cached(salt: str) -> int:
        answer = engine.call("generate", prompts=[prompt], max_tokens=1, salt=salt)
        engine.call("settle")
        found: int = answer["cached"][0]
        return found

    assert [cached("a"), cached("b"), cached(""), cached("a")] == [0, 0, 0, 2 * CHUNK]


def test_many_mixed_requests_leave_nothing_held(
    engine: Engine, server: Server, start: Start
) -> None:
    """500 requests with and without shared prefixes; every answer is correct."""
    lengths = [20, CHUNK, 150, SHARED + 30, 500, 700]
    prompts = [
        make_prompt(lengths[n % len(lengths)], seed=n, shared=SHARED * (n % 3 > 0))
        for n in range(60)
    ]
    plain = start(**OPTIONS)
    expected = generate_sequentially(plain, prompts, max_tokens=4)["tokens"]
    plain.close()
    answers = engine.generate([prompts[n % 60] for n in range(500)], max_tokens=4)
    assert answers["tokens"] == [expected[n % 60] for n in range(500)]
    assert sum(answers["cached"]) > 50_000
    assert engine.call("metric", name="num_preemptions") > 0
    assert_blocks_free(engine)
    assert_nothing_held(server)
    with KVClient(server.address) as client:
        counters = client.status().counters
    assert counters["leases_granted"] > 200
