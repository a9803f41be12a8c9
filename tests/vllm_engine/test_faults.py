"""An engine goes on, whatever becomes of the server."""

from __future__ import annotations

import threading
from typing import Any

from tests.system.server_fixture import CHUNK, wait_until
from tests.vllm_engine.conftest import Serve, Start, ask_in_turn, make_prompt
from tests.vllm_engine.test_engine import assert_blocks_are_back

HASTY = {"lookup_timeout_s": 0.5, "store_timeout_s": 1, "retry_s": 0.1}


def test_an_engine_outlives_its_servers(serve: Serve, start: Start) -> None:
    """Absent, started, killed in the middle of a run, started again, stopped."""
    server = serve()
    server.stop()
    engine = start(
        address=server.address,
        connector=HASTY,
        wait=False,
        enable_prefix_caching=False,
    )
    prompts = [make_prompt(5 * CHUNK + 9, seed) for seed in range(4)]
    absent = ask_in_turn(engine, prompts)
    assert absent["cached"] == [0] * 4
    # One warning of the scheduler's half, one of the worker's, and no more.
    wait_until(lambda: engine.words.count("no KV cache for now") == 2)
    assert ask_in_turn(engine, prompts) == absent
    assert engine.words.count("no KV cache for now") == 2

    server = server.restart()
    engine.ask("connect")
    assert ask_in_turn(engine, prompts) == absent
    found = {"tokens": absent["tokens"], "cached": [5 * CHUNK] * 4}
    assert ask_in_turn(engine, prompts) == found

    # 120 requests that hit and miss, and a kill somewhere in their middle.
    many = [make_prompt(5 * CHUNK + 9, seed % 40) for seed in range(120)]
    killer = threading.Timer(1.0, server.kill)
    killer.start()
    answers = engine.generate(many, max_tokens=4)
    killer.join()
    assert [len(tokens) for tokens in answers["tokens"]] == [4] * 120
    assert_blocks_are_back(engine)
    assert ask_in_turn(engine, prompts) == absent

    server = server.restart()
    try:
        engine.ask("connect")
        assert ask_in_turn(engine, prompts) == absent
        assert ask_in_turn(engine, prompts) == found
        _stand_still(server, engine, prompts, absent)
        engine.ask("connect")
        assert ask_in_turn(engine, prompts)["tokens"] == absent["tokens"]
        assert_blocks_are_back(engine)
        engine.close()
    finally:
        server.close()


def _stand_still(server: Any, engine: Any, prompts: Any, absent: Any) -> None:
    """Stop the server; the engine computes everything, and gets its blocks back."""
    server.pause()
    try:
        assert ask_in_turn(engine, prompts) == absent
        assert_blocks_are_back(engine)
    finally:
        server.resume()
    wait_until(lambda: engine.words.count("is back") >= 2)
