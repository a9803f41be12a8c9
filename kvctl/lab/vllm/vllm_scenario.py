"""A workload sent to real vLLM engines over HTTP, without and with the connector.

Three engines run one after another, each a new process with an empty cache: one
without the connector, one that stores, one that retrieves. The result has vLLM's
metrics beside the server's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from kvcore.client import KVClient
from kvcore.config import L1Config, ServerConfig
from kvcore.errors import SetupError, Unavailable
from kvcore.option_structs import ByteSize, Options, encode_hook, load
from kvctl.console import Table
from kvctl.lab.config.workload_config import Chat, Workload
from kvctl.lab.run.environment import Environment, detect
from kvctl.lab.systems.child_processes import LocalServer
from kvctl.lab.vllm.vllm_server import Answer, VLLMServer
from kvctl.lab.workload.access_generators import Access, accesses

Positive = Annotated[int, Meta(ge=1)]

TINY = "tiny-"
NUM_SPECIAL = 4
"""Token ids reserved for special tokens; prompts do not use them."""
RESULT_VERSION = 1
REGISTERED_S = 60.0
POLL_S = 0.1

PLAIN, FIRST, SECOND = "without", "first", "second"


class EngineConfig(Options, frozen=True):
    """The vLLM engine."""

    model: Annotated[
        str,
        Meta(description="folder or name; tiny-llama, tiny-mla, tiny-hybrid: built"),
    ] = "tiny-llama"
    python: Annotated[
        str, Meta(description="Python with vLLM installed; empty: this one")
    ] = ""
    vocabulary: Positive = 512
    max_prompt_tokens: Annotated[
        int, Meta(ge=1, description="longer prompts of a trace are truncated")
    ] = 4096
    options: Annotated[
        tuple[str, ...], Meta(description="options of vLLM's command line")
    ] = ()


class VLLMScenario(Options, frozen=True):
    """A scenario with real engines; its file has a table `vllm`."""

    vllm: EngineConfig
    question: Annotated[str, Meta(description="the question that a run answers")] = ""
    workload: Workload = Chat(
        num_sessions=16,
        turns=1,
        system_tokens=512,
        user_tokens=2560,
        answer_tokens=16,
        vocabulary=512,
    )
    max_requests: Positive = 64
    concurrency: Positive = 1
    output_tokens: Positive = 16
    server: ServerConfig = ServerConfig(l1=L1Config(size=ByteSize(256 << 20)))


class VLLMRun(msgspec.Struct, frozen=True):
    """Measurements of one engine."""

    name: str
    first_token_ms: Annotated[
        dict[str, float], Meta(description="p50, p90 and mean over requests")
    ]
    requests_per_s: float
    prompt_tokens: int
    engine_hit_tokens: Annotated[
        int, Meta(description="vLLM's counter of its prefix cache")
    ]
    external_hit_tokens: Annotated[
        int, Meta(description="vLLM's counter of the connector")
    ]
    server_hit_tokens: Annotated[int, Meta(description="the server's counter")]
    same_as_without: Annotated[
        int, Meta(description="answers equal to those without the connector")
    ]


class VLLMResult(msgspec.Struct, frozen=True):
    """The result of a scenario with real engines."""

    version: int
    name: str
    scenario: VLLMScenario
    seed: int
    started: str
    environment: Environment
    runs: tuple[VLLMRun, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """Reasons for exit code 1: unequal answers, or no hit in the second engine."""
        found = [
            f"{run.name}: {self.num_requests - run.same_as_without} answers differ"
            for run in self.runs
            if run.same_as_without < self.num_requests
        ]
        if not self.runs[-1].external_hit_tokens:
            found.append("the second engine had no hit")
        return tuple(found)

    @property
    def num_requests(self) -> int:
        """Number of requests per engine."""
        return self.runs[0].same_as_without

    def save(self, folder: Path) -> Path:
        """Write `NAME-STARTED.json` into a folder, created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{self.started}.json"
        text = msgspec.json.format(msgspec.json.encode(self, enc_hook=encode_hook))
        path.write_bytes(text + b"\n")
        return path


def is_served(path: Path) -> bool:
    """Return whether a scenario file has a table `vllm`."""
    try:
        return "vllm" in tomllib.loads(path.read_text())
    except (OSError, ValueError):
        return False  # The reader of the file reports the error.


def read(
    path: Path, overrides: Sequence[str] = (), trace: Path | None = None
) -> VLLMScenario:
    """Read a scenario file; a trace replaces its workload.

    Raises:
        SetupError: with file, key and the nearest known key.
    """
    settings = list(overrides)
    if trace is not None:
        settings += ["workload.kind=trace", f"workload.trace={json.dumps(str(trace))}"]
    return load(VLLMScenario, path, settings)


def run(
    name: str, scenario: VLLMScenario, seed: int, report: Callable[[float, str], None]
) -> VLLMResult:
    """Run the workload with three engines; `report` receives progress, 0 to 1.

    Raises:
        SetupError: vLLM or the server could not start.
        Unavailable: vLLM or the server stopped.
    """
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    prompts = _prompts(scenario, seed)
    with tempfile.TemporaryDirectory(prefix="kvlab-") as folder:
        runner = EngineRunner(scenario, prompts, Path(folder))
        server = LocalServer(scenario.server)
        try:
            runs = []
            for number, which in enumerate((PLAIN, FIRST, SECOND)):
                report(number / 3, f"vLLM {which}")
                runs.append(runner.run(which, server.address))
        finally:
            trouble = server.stop()
    if trouble:
        raise SetupError(trouble)
    return VLLMResult(
        RESULT_VERSION, name, scenario, seed, started, detect(), tuple(runs)
    )


def _prompts(scenario: VLLMScenario, seed: int) -> list[list[int]]:
    """Return prompts of tokens in the model's vocabulary."""
    engine = scenario.vllm
    num_tokens = engine.vocabulary - NUM_SPECIAL
    prompts = []
    for access in _accesses(scenario, seed):
        tokens = access.tokens()[: engine.max_prompt_tokens].astype(np.int64)
        prompts.append((tokens % num_tokens + NUM_SPECIAL).tolist())
    if not prompts:
        raise SetupError("the workload has no requests")
    return prompts


def prompt_lengths(scenario: VLLMScenario, seed: int) -> list[int]:
    """Return the number of tokens of each prompt."""
    most = scenario.vllm.max_prompt_tokens
    return [min(access.num_tokens, most) for access in _accesses(scenario, seed)]


def _accesses(scenario: VLLMScenario, seed: int) -> Iterator[Access]:
    return islice(accesses(scenario.workload, seed), scenario.max_requests)


class EngineRunner:
    """Runs the engines of one scenario, one after another."""

    def __init__(
        self, scenario: VLLMScenario, prompts: list[list[int]], folder: Path
    ) -> None:
        self._scenario = scenario
        self._prompts = prompts
        self._folder = folder
        self._python = scenario.vllm.python or sys.executable
        self._model = self._make_model()
        self._expected: list[str] = []

    def _make_model(self) -> str:
        model = self._scenario.vllm.model
        if not model.startswith(TINY):
            return model
        path = self._folder / model
        arguments = ["kvcore.vllm.tiny_models", model.removeprefix(TINY), str(path)]
        command = [self._python, "-m", *arguments]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            lines = made.stderr.strip().splitlines()
            last = lines[-1] if lines else made.returncode
            raise SetupError(
                f"vllm.model = {model}: {last} (set vllm.python to a Python with "
                "vLLM: `pip install vllm`, or `make demo-vllm` in a clone)"
            )
        return str(path)

    def run(self, name: str, address: str) -> VLLMRun:
        """Start an engine, send all prompts, and stop it."""
        options = list(self._scenario.vllm.options)
        if name != PLAIN:
            options += ["--kv-transfer-config", transfer_config(address)]
        with KVClient(address, label="bench driver") as client:
            before = client.status(0).counters
            log = self._folder / f"{name}.log"
            engine = VLLMServer(self._python, self._model, options, log)
            try:
                if name != PLAIN:
                    self._await_registered(client)
                begun = perf_counter()
                answers = self._send(engine)
                elapsed = perf_counter() - begun
                counters = engine.counters()
            finally:
                engine.stop()
            after = client.status(0).counters
        chunks = after["lookup_chunks_hit"] - before["lookup_chunks_hit"]
        return self._sum_up(
            name, answers, elapsed, counters, chunks * self._scenario.server.chunk_size
        )

    def _await_registered(self, client: KVClient) -> None:
        give_up = monotonic() + REGISTERED_S
        while not client.status(0).instances:
            if monotonic() > give_up:
                raise Unavailable("vLLM did not register its cache; see its log")
            sleep(POLL_S)

    def _send(self, engine: VLLMServer) -> list[Answer]:
        scenario = self._scenario
        with ThreadPoolExecutor(scenario.concurrency) as threads:
            complete = partial(engine.complete, num_output=scenario.output_tokens)
            return list(threads.map(complete, self._prompts))

    def _sum_up(
        self,
        name: str,
        answers: list[Answer],
        elapsed_s: float,
        counters: dict[str, float],
        server_hit_tokens: int,
    ) -> VLLMRun:
        texts = [answer.text for answer in answers]
        if name == PLAIN:
            self._expected = texts
        first = np.array([answer.first_token_s for answer in answers]) * 1e3
        return VLLMRun(
            name=name,
            first_token_ms={
                "p50": float(np.percentile(first, 50)),
                "p90": float(np.percentile(first, 90)),
                "mean": float(first.mean()),
            },
            requests_per_s=len(answers) / elapsed_s,
            prompt_tokens=sum(map(len, self._prompts)),
            engine_hit_tokens=int(counters.get("prefix_cache_hits", 0)),
            external_hit_tokens=int(counters.get("external_prefix_cache_hits", 0)),
            server_hit_tokens=server_hit_tokens,
            same_as_without=sum(
                a == b for a, b in zip(texts, self._expected, strict=True)
            ),
        )


def transfer_config(address: str) -> str:
    """Return vLLM's `--kv-transfer-config` for the connector, as JSON."""
    return json.dumps(
        {
            "kv_connector": "KVCtlConnector",
            "kv_connector_module_path": "kvcore.vllm.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"address": address},
        }
    )


def build_tables(result: VLLMResult) -> list[Table | str]:
    """Return tables and lines for `console.show`."""
    rows = tuple(
        (
            run.name,
            f"{run.first_token_ms['p50']:.1f}",
            f"{run.first_token_ms['p90']:.1f}",
            f"{run.requests_per_s:.1f}",
            f"{run.engine_hit_tokens:,}",
            f"{run.external_hit_tokens:,}",
            f"{run.server_hit_tokens:,}",
            f"{run.same_as_without} of {result.num_requests}",
        )
        for run in result.runs
    )
    columns = (
        "engine", ">first token p50 ms", ">p90 ms", ">requests/s",
        ">cached: vLLM's own", ">cached: external", ">cached: server",
        ">equal answers",
    )  # fmt: skip
    total = result.runs[0].prompt_tokens
    title = f"{result.name}: {result.num_requests} requests, {total:,} prompt tokens"
    return [Table(title, columns, rows), *(f"problem: {p}" for p in result.problems)]
