"""An engine continues when its server is absent, killed or stopped."""

from __future__ import annotations

import threading
from typing import Any

from tests.system.server_fixture import CHUNK, wait_until
from tests.vllm_engine.conftest import Serve, Start, generate_sequentially, make_prompt
from tests.vllm_engine.test_engine import assert_blocks_free

SHORT_TIMEOUTS = {"lookup_timeout_s": 0.5, "store_timeout_s": 1, "retry_s": 0.1}


def test_an_engine_continues_across_server_faults(serve: Serve, start: Start) -> None:
    """The server is absent, started, killed during a run, restarted, then stopped."""
    server = serve()
    server.stop()
    engine = start(
        address=server.address,
        connector=SHORT_TIMEOUTS,
        wait=False,
        enable_prefix_caching=False,
    )
    prompts = [make_prompt(5 * CHUNK + 9, seed) for seed in range(4)]
    absent = generate_sequentially(engine, prompts)
    assert absent["cached"] == [0] * 4
    # One warning from the scheduler side and one from the worker side.
    wait_until(lambda: engine.log_text.count("no KV cache for now") == 2)
    assert generate_sequentially(engine, prompts) == absent
    assert engine.log_text.count("no KV cache for now") == 2

    server = server.restart()
    engine.call("connect")
    assert generate_sequentially(engine, prompts) == absent
    found = {"tokens": absent["tokens"], "cached": [5 * CHUNK] * 4}
    assert generate_sequentially(engine, prompts) == found

    # 120 requests that hit and miss; the server is killed meanwhile.
    many = [make_prompt(5 * CHUNK + 9, seed % 40) for seed in range(120)]
    killer = threading.Timer(1.0, server.kill)
    killer.start()
    answers = engine.generate(many, max_tokens=4)
    killer.join()
    assert [len(tokens) for tokens in answers["tokens"]] == [4] * 120
    assert_blocks_free(engine)
    assert generate_sequentially(engine, prompts) == absent

    server = server.restart()
    try:
        engine.call("connect")
        assert generate_sequentially(engine, prompts) == absent
        assert generate_sequentially(engine, prompts) == found
        _check_stopped_server(server, engine, prompts, absent)
        engine.call("connect")
        assert generate_sequentially(engine, prompts)["tokens"] == absent["tokens"]
        assert_blocks_free(engine)
        engine.close()
    finally:
        server.close()


def _check_stopped_server(server: Any, engine: Any, prompts: Any, absent: Any) -> None:
    """Stop the server; the engine computes everything and frees its blocks."""
    server.pause()
    try:
        assert generate_sequentially(engine, prompts) == absent
        assert_blocks_free(engine)
    finally:
        server.resume()
    wait_until(lambda: engine.log_text.count("is back") >= 2)
