"""Handle of a vLLM engine that runs in a forked process."""

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

LONG_TIMEOUTS = {"lookup_timeout_s": 30, "store_timeout_s": 30, "load_timeout_s": 30}
"""Long enough for a busy machine; tests of faults set shorter ones."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "PYTHONHASHSEED": "0",
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    # Threads of several engines would spin and wait for each other.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@cache
def fork_server() -> ForkServerContext:
    """Return the context that forks processes from one that has imported vLLM."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.vllm_engine.engine_process"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


def run_in_fork_server(call: Callable[..., object], *arguments: object) -> None:
    """Call a function in a forked process, where torch is already imported."""
    process = fork_server().Process(target=call, args=arguments)
    process.start()
    process.join(START_S)
    assert process.exitcode == 0


class Engine:
    """An engine process. The constructor returns when the engine is ready."""

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
            extra = {"address": address, **LONG_TIMEOUTS, **(connector or {})}
            options["kv_transfer_config"] = {
                **CONNECTOR,
                "kv_role": role,
                "kv_connector_extra_config": extra,
            }
        self.log = log
        self._pipe, theirs = fork_server().Pipe()
        self.process = fork_server().Process(
            target=_run_engine, args=(theirs, options, env or {}, log)
        )
        self.process.start()
        theirs.close()
        try:
            self._answer(START_S)
            if address and wait:
                self.call("connect")
        except BaseException:
            self.kill()
            raise

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Call a method of `EngineProcess` there; return its result."""
        self._pipe.send((name, arguments))
        return self._answer(ANSWER_S)

    def generate(self, prompts: list[list[int]], max_tokens: int = 16) -> Any:
        """Complete prompts greedily; `tokens` and `cached` have one item per prompt."""
        return self.call("generate", prompts=prompts, max_tokens=max_tokens)

    def _answer(self, seconds: float) -> Any:
        assert self._pipe.poll(seconds), f"no answer: {self.log_text[-3000:]}"
        try:
            return self._pipe.recv()
        except EOFError:
            raise AssertionError(f"the engine ended: {self.log_text[-3000:]}") from None

    @property
    def log_text(self) -> str:
        """The content of the engine's log."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Send SIGKILL and wait for the process to end."""
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def close(self) -> None:
        """Stop the engine; assert exit status 0. Idempotent."""
        if self._pipe.closed:
            return
        self._pipe.close()
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        assert self.process.exitcode == 0, self.log_text[-3000:]


def _run_engine(*arguments: Any) -> None:
    # Imported here, since only forked processes may import vLLM.
    from tests.vllm_engine import engine_process

    engine_process.run(*arguments)
