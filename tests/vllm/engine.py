"""A real vLLM engine in a process of its own: the child's side and the test's side.

The child reads a command a line and answers a line, both JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

START_S = 180
ANSWER_S = 180

CONNECTOR = {
    "kv_connector": "KVCtlConnector",
    "kv_connector_module_path": "kvcore.vllm.connector",
    "kv_role": "kv_both",
}


PATIENCE = {"lookup_timeout_s": 30, "store_timeout_s": 30, "load_timeout_s": 30}
"""A busy machine changes no outcome; tests of faults set less."""


class Engine:
    """An engine as the test sees it; ready when this returns."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        address: str = "",
        connector: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        wait: bool = True,
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
                "kv_connector_extra_config": extra,
            }
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            **(env or {}),
        }
        self.log = log
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        try:
            self._expect(START_S)
            if address and wait:
                self.ask("connect")
        except BaseException:
            self.process.kill()
            self.process.communicate()
            raise

    def ask(self, name: str, **arguments: Any) -> Any:
        """Have it done; returns what the command returned."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        return self._expect(ANSWER_S)

    def generate(self, prompts: list[list[int]], max_tokens: int = 16) -> Any:
        """Complete prompts greedily; `tokens` and `cached`, a list each."""
        return self.ask("generate", prompts=prompts, max_tokens=max_tokens)

    def _expect(self, seconds: float) -> Any:
        assert self.process.stdout is not None
        killer = threading.Timer(seconds, self.process.kill)
        killer.start()
        line = self.process.stdout.readline()
        killer.cancel()
        assert line, f"the engine ended: {self.words[-3000:]}"
        answer = json.loads(line)
        assert answer["error"] is None, answer["error"]
        return answer["result"]

    @property
    def words(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Let it end; it must end well. Idempotent."""
        if self.process.returncode is not None:
            return
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        assert code == 0, self.words[-3000:]


class _Child:
    """What the child can be told to do."""

    def connect(self) -> Any:
        """Wait until the server is well and knows every rank of this engine."""
        from kvcore.errors import KVError
        from kvcore.keys import SessionKey

        half = self.scheduler.connector._scheduler
        pause = threading.Event()
        for number in itertools.count():
            server = half._link.server
            if server is not None:
                session = SessionKey("probe", f"{os.getpid()}-{number}")
                tokens = range(server.chunk_size)
                try:
                    server.client.lookup(session, half._model, half._world_size, tokens)
                    server.client.end_session(session)
                except KVError:
                    pass
                else:
                    return number
            pause.wait(0.05)
        return None

    @property
    def scheduler(self) -> Any:
        """The engine's scheduler, which lives in this process."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**options)
        self.number = 0

    def generate(
        self, prompts: list[list[int]], max_tokens: int, salt: str = ""
    ) -> Any:
        """Complete prompts."""
        from vllm import SamplingParams

        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        if salt:
            for one in inputs:
                one["cache_salt"] = salt
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
        }

    def abort_while_loading(self, prompt: list[int]) -> Any:
        """Abort a request in the step after its load began; run until all is quiet."""
        from vllm import SamplingParams

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
        return {"was_loading": was_loading}

    def break_loads(self, broken: bool) -> Any:
        """Let every load fail from now on, after it was found and promised."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        link = get_kv_transfer_group()._worker._link
        if not broken:
            link.__class__ = self.link_class
            return None
        self.link_class = type(link)
        link.__class__ = type("Broken", (self.link_class,), {"server": None})
        return None

    def settle(self) -> Any:
        """Step until no copy is under way; return the scheduler's free blocks."""
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

    def counted(self, counter: str) -> Any:
        """Return one of vLLM's own counters."""
        return sum(
            m.value for m in self.llm.get_metrics() if m.name == f"vllm:{counter}"
        )

    def reset(self) -> Any:
        """Forget the engine's own prefix cache."""
        return bool(self.llm.reset_prefix_cache())


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    child: Any = None

    def answer(result: Any, error: str | None = None) -> None:
        answers.write(json.dumps({"result": result, "error": error}) + "\n")
        answers.flush()

    child = _Child(json.loads(sys.argv[1]))
    answer("ready")
    for line in sys.stdin:
        name, arguments = json.loads(line)
        answer(getattr(child, name)(**arguments))


if __name__ == "__main__":
    _main()
