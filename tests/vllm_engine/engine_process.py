"""A vLLM engine that executes commands of a test.

The process is forked from one that has imported vLLM, because the import takes longer
than the rest of an engine's start. A command is a method name and its arguments; each
gets one reply.
"""

from __future__ import annotations

import itertools
import os
import threading
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - imported once, before engines are forked
from vllm import LLM, SamplingParams
from vllm.v1.executor import multiproc_executor

from kvcore.errors import KVError
from kvcore.keys import SessionKey


def run(
    pipe: Connection, options: dict[str, Any], env: dict[str, str], log: Path
) -> None:
    """Execute commands until the other end of the pipe is closed."""
    os.environ.update(env)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Ranks are forked too: vLLM would spawn them, and each would import it again.
    multiproc_executor.get_mp_context = lambda: get_context("fork")
    process = EngineProcess(options)
    pipe.send("ready")
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            break
        pipe.send(getattr(process, name)(**arguments))
    process.llm.llm_engine.engine_core.shutdown()


class EngineProcess:
    """The engine, and one method per command."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.llm = LLM(**options)
        self.number = 0

    @property
    def scheduler(self) -> Any:
        """The engine's scheduler, which lives in this process."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def connect(self) -> int:
        """Wait until the server is available and has registered every rank."""
        scheduler = self.scheduler.connector._scheduler
        pause = threading.Event()
        for number in itertools.count():
            server = scheduler._link.server
            if server is not None:
                session = SessionKey("probe", f"{os.getpid()}-{number}")
                tokens = range(server.chunk_size)
                try:
                    server.client.lookup(
                        session, scheduler._model, scheduler._world_size, tokens
                    )
                    server.client.end_session(session)
                except KVError:
                    pass
                else:
                    return number
            pause.wait(0.05)
        raise AssertionError

    def generate(
        self, prompts: list[list[int]], max_tokens: int, salt: str = "", lora: str = ""
    ) -> dict[str, Any]:
        """Complete prompts; return their tokens and numbers of cached tokens."""
        from vllm.lora.request import LoRARequest

        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        if salt:
            for one in inputs:
                one["cache_salt"] = salt
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = self.llm.generate(
            inputs,
            params,
            use_tqdm=False,
            lora_request=LoRARequest("adapter", 1, lora) if lora else None,
        )
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
        }

    def abort_while_loading(self, prompt: list[int]) -> bool:
        """Abort a request after its load has begun; return whether it was loading."""
        engine = self.llm.llm_engine
        scheduler = self.scheduler
        self.number += 1
        request_id = f"aborted-{self.number}"
        params = SamplingParams(temperature=0, max_tokens=8)
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        was_loading = False
        while scheduler.has_requests():
            engine.step()
            states = [str(r.status) for r in scheduler.requests.values()]
            if not was_loading and any("REMOTE" in state for state in states):
                was_loading = True
                engine.abort_request([request_id])
        return was_loading

    def fail_loads(self, enabled: bool) -> None:
        """Let every load fail (or no longer) after a successful lookup."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        link = get_kv_transfer_group()._worker._link
        if not enabled:
            link.__class__ = self.link_class
            return
        self.link_class = type(link)
        link.__class__ = type("Broken", (self.link_class,), {"server": None})

    def settle(self) -> dict[str, int]:
        """Step until no copy is in progress; return numbers of blocks and requests."""
        engine = self.llm.llm_engine
        scheduler = self.scheduler
        while scheduler.has_requests():
            engine.engine_core.engine_core.step()
        pool = scheduler.kv_cache_manager.block_pool
        return {
            "free": pool.get_num_free_blocks(),
            "all": pool.num_gpu_blocks,
            "requests": len(scheduler.requests),
        }

    def metric(self, name: str) -> float:
        """Return the value of one of vLLM's metrics."""
        return float(
            sum(m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}")
        )

    def reset(self, connector: bool = False) -> bool:
        """Reset the engine's prefix cache, and with `connector` the connector's KV."""
        return bool(self.llm.reset_prefix_cache(reset_connector=connector))
