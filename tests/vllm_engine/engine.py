"""A real vLLM engine in a process of its own, as the test sees it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

START_S = 180
ANSWER_S = 180

CONNECTOR = {
    "kv_connector": "KVCtlConnector",
    "kv_connector_module_path": "kvcore.vllm.connector",
}

PATIENCE = {"lookup_timeout_s": 30, "store_timeout_s": 30, "load_timeout_s": 30}
"""A busy machine changes no outcome; tests of faults set less."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "PYTHONHASHSEED": "0",
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    # Threads of several engines that spin for each other cost more than they bring.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@cache
def nursery() -> ForkServerContext:
    """Return what forks processes from one that has imported vLLM."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.vllm_engine.child"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


def in_nursery(write: Callable[..., object], *arguments: object) -> None:
    """Have something written where torch and transformers are imported already."""
    process = nursery().Process(target=write, args=arguments)
    process.start()
    process.join(START_S)
    assert process.exitcode == 0


class Engine:
    """An engine; ready when this returns."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        address: str = "",
        connector: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        wait: bool = True,
        role: str = "kv_both",
        **options: Any,
    ) -> None:
        options = {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 64 << 20,
            "max_model_len": 4096,
            "disable_log_stats": False,
            "seed": 0,
            **options,
        }
        if address:
            extra = {"address": address, **PATIENCE, **(connector or {})}
            options["kv_transfer_config"] = {
                **CONNECTOR,
                "kv_role": role,
                "kv_connector_extra_config": extra,
            }
        self.log = log
        self._told, theirs = nursery().Pipe()
        self.process = nursery().Process(
            target=_be_an_engine, args=(theirs, options, env or {}, log)
        )
        self.process.start()
        theirs.close()
        try:
            self._answer(START_S)
            if address and wait:
                self.ask("connect")
        except BaseException:
            self.kill()
            raise

    def ask(self, name: str, **arguments: Any) -> Any:
        """Have it done; returns what the command returned."""
        self._told.send((name, arguments))
        return self._answer(ANSWER_S)

    def generate(self, prompts: list[list[int]], max_tokens: int = 16) -> Any:
        """Complete prompts greedily; `tokens` and `cached`, a list each."""
        return self.ask("generate", prompts=prompts, max_tokens=max_tokens)

    def _answer(self, seconds: float) -> Any:
        assert self._told.poll(seconds), f"no answer: {self.words[-3000:]}"
        try:
            return self._told.recv()
        except EOFError:
            raise AssertionError(f"the engine ended: {self.words[-3000:]}") from None

    @property
    def words(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL it."""
        self.process.kill()
        self.process.join()
        self._told.close()

    def close(self) -> None:
        """Let it end; it must end well. Idempotent."""
        if self._told.closed:
            return
        self._told.close()
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        assert self.process.exitcode == 0, self.words[-3000:]


def _be_an_engine(*arguments: Any) -> None:
    # Not at the top: only these processes import vLLM.
    from tests.vllm_engine import child

    child.run(*arguments)
