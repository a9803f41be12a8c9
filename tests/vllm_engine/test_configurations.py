"""Configurations: ranks, data types, draft tokens, LoRA, two engines, tiers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvcore.client import KVClient
from tests.system.server_fixture import CHUNK, wait_until
from tests.vllm_engine import lora
from tests.vllm_engine.conftest import Serve, Start, generate_sequentially, make_prompt
from tests.vllm_engine.engine import run_in_fork_server
from tests.vllm_engine.test_models import assert_nothing_held

Prompts = list[list[int]]

MAX_TOKENS = 8
"""Tokens per answer; few, because ranks that share two cores are slow."""

TWO_RANKS = {"tensor_parallel_size": 2}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "ranks": TWO_RANKS,
    "drafts": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
        }
    },
    "fp8": {"kv_cache_dtype": "fp8"},
    "bfloat16": {"dtype": "bfloat16", "enable_prefix_caching": False},
    "worker": {"connector": {"driver": "worker"}, "enable_prefix_caching": False},
}


HAS_AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text()
NEEDS = {
    "fp8": pytest.mark.skipif(
        not HAS_AVX512, reason="vLLM's fp8 cache on a CPU needs AVX-512"
    )
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=NEEDS.get(way, ())) for way in CONFIGURATIONS]
)
def test_a_second_engine_answers_the_same(way: str, serve: Serve, start: Start) -> None:
    """Answers agree without a connector, cold, and warm in a new process."""
    options = {"max_num_batched_tokens": 256, **CONFIGURATIONS[way]}
    prompts = [make_prompt(length, seed) for seed, length in enumerate((200, 700, 192))]
    plain_options = {k: v for k, v in options.items() if k != "connector"}
    plain = start(**plain_options)
    expected = generate_sequentially(plain, prompts, MAX_TOKENS)["tokens"]
    plain.close()
    server = serve()
    for cached in ([0, 0, 0], [192, 640, 192]):
        engine = start(address=server.address, **options)
        answers = generate_sequentially(engine, prompts, MAX_TOKENS)
        assert answers == {"tokens": expected, "cached": cached}
        assert_nothing_held(server)
        engine.close()


def test_a_reset_after_changed_weights_hides_older_chunks(
    serve: Serve, start: Start
) -> None:
    """After a reset with `reset_connector` only newly stored KV is found."""
    engine = start(address=serve().address)
    prompt = make_prompt(2 * CHUNK + 5)

    def ask() -> int:
        assert engine.call("reset")
        found: int = generate_sequentially(engine, [prompt], 1)["cached"][0]
        return found

    assert [ask(), ask()] == [0, 2 * CHUNK]
    assert engine.call("reset", connector=True)
    assert [ask(), ask()] == [0, 2 * CHUNK]
    engine.close()


def test_an_engine_that_cannot_share_logs_the_reason(
    serve: Serve, start: Start
) -> None:
    """It logs the reason and serves without the cache."""
    engine = start(address=serve().address, role="kv_producer", wait=False)
    prompt = make_prompt(2 * CHUNK + 5)
    for _ in range(2):
        assert engine.call("reset")
        assert generate_sequentially(engine, [prompt], 1)["cached"] == [0]
    assert "no KV cache: kv_role kv_producer" in engine.log_text
    engine.close()


def test_adapters_keep_requests_apart(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    """KV computed with a LoRA adapter is found only by requests with it."""
    folder = tmp_path / "adapter"
    run_in_fork_server(lora.write, folder)
    engine = start(
        address=serve().address,
        enable_prefix_caching=False,
        enable_lora=True,
        max_lora_rank=lora.RANK,
    )
    prompt = make_prompt(2 * CHUNK + 5)

    def ask(adapter: str) -> tuple[list[int], int]:
        answer = engine.call("generate", prompts=[prompt], max_tokens=8, lora=adapter)
        engine.call("settle")
        return answer["tokens"][0], answer["cached"][0]

    with_it, without = ask(str(folder)), ask("")
    assert [with_it[1], without[1]] == [0, 0]
    assert with_it[0] != without[0]
    assert ask(str(folder)) == (with_it[0], 2 * CHUNK)
    assert ask("") == (without[0], 2 * CHUNK)
    engine.close()


def test_two_engines_at_once_share_prompts(serve: Serve, start: Start) -> None:
    """Each engine loads the other's KV while both are busy."""
    server = serve()
    options = {
        "address": server.address,
        "enable_prefix_caching": False,
    }
    one, two = start(**options), start(**options)
    mine = [make_prompt(5 * CHUNK + 7, seed) for seed in range(8)]
    yours = [make_prompt(5 * CHUNK + 7, seed) for seed in range(100, 108)]
    with ThreadPoolExecutor(2) as threads:

        def both(first: Prompts, second: Prompts) -> tuple[Any, Any]:
            asked = threads.submit(generate_sequentially, one, first)
            theirs = generate_sequentially(two, second)
            return asked.result(), theirs

        cold = both(mine, yours)
        warm = both(yours, mine)
    assert [answer["cached"] for answer in cold] == [[0] * 8] * 2
    assert [answer["cached"] for answer in warm] == [[5 * CHUNK] * 8] * 2
    assert [answer["tokens"] for answer in warm] == [
        answer["tokens"] for answer in reversed(cold)
    ]
    assert_nothing_held(server)
    one.close()
    two.close()


def test_chunks_in_a_file_tier_survive_a_server_restart(
    serve: Serve, start: Start, tmp_path: Path
) -> None:
    """A new server with the same files returns the chunks of its predecessor."""
    tier = ("--tier", f"file://{tmp_path}/tier")
    prompts = [make_prompt(length, seed) for seed, length in enumerate((200, 1050))]
    server = serve(*tier)
    first = start(address=server.address)
    cold = generate_sequentially(first, prompts)
    first.close()
    with KVClient(server.address) as client:
        wait_until(lambda: _is_written(client))
    server.stop()
    server = server.restart()
    try:
        second = start(address=server.address)
        warm = generate_sequentially(second, prompts)
        second.close()
        assert warm == {"tokens": cold["tokens"], "cached": [192, 1024]}
        assert_nothing_held(server)
    finally:
        server.close()


def _is_written(client: KVClient) -> bool:
    """Return whether all write-back to tiers has completed."""
    waiting = [tier.write_back for tier in client.status().tiers]
    return not any(one.num_parts or one.num_writing for one in waiting)
