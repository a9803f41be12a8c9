"""A real vLLM API server: its process, requests over HTTP, and metrics."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import perf_counter
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from kvcore.errors import Unavailable
from kvctl.lab.systems.child_processes import ChildProcess, free_port

ANSWER_S = 600.0
LOG_TAIL = 500


@dataclass(frozen=True, slots=True)
class Answer:
    """The completion of one prompt, with its latencies."""

    text: str
    first_token_s: float
    total_s: float


class VLLMServer(ChildProcess):
    """A process of `vllm.entrypoints.openai.api_server`, ready after construction."""

    ready_s, stop_s = 300.0, 30.0
    stop_signal = signal.SIGINT

    def __init__(
        self, python: str, model: str, options: Sequence[str], log: Path
    ) -> None:
        """Start it and wait until it is ready.

        Raises:
            SetupError: it could not start; the message has the end of its log.
            Unavailable: it was not ready in time.
        """
        super().__init__("vLLM", log, " (vllm.python is a Python with vLLM)")
        self._model = model
        self.port = free_port()
        command = [python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", model, "--host", "127.0.0.1", "--port", str(self.port)]
        offline = os.environ.get("HF_HUB_OFFLINE", "1")
        environment = {"HF_HUB_OFFLINE": offline, "VLLM_NO_USAGE_STATS": "1"}
        self._start([*command, *options], environment)

    def _is_ready(self) -> bool:
        try:
            with urlopen(self._url("/health"), timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def complete(self, tokens: Sequence[int], num_output: int) -> Answer:
        """Complete a prompt greedily; latencies count from sending.

        Raises:
            Unavailable: vLLM refused the request or stopped.
        """
        body = {
            "model": self._model,
            "prompt": list(tokens),
            "max_tokens": num_output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        try:
            return _stream(connection, json.dumps(body))
        except (OSError, HTTPException, ValueError, LookupError) as error:
            raise Unavailable(f"vLLM: {error}") from None
        finally:
            connection.close()

    def counters(self) -> dict[str, float]:
        """Return vLLM's counters, summed over engines, without their prefix."""
        with urlopen(self._url("/metrics"), timeout=10) as reply:
            text = reply.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            if family.type != "counter" or not family.name.startswith("vllm:"):
                continue
            name = family.name.removeprefix("vllm:")
            found[name] = sum(
                s.value for s in family.samples if s.name.endswith("_total")
            )
        return found

    def log_tail(self) -> str:
        """Return the last characters of the log."""
        return self._log.read_text(errors="replace").strip()[-LOG_TAIL:]


def _stream(connection: HTTPConnection, body: str) -> Answer:
    start = perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    reply = connection.getresponse()
    if reply.status != 200:
        raise ValueError(f"{reply.status}: {reply.read()[:LOG_TAIL].decode()}")
    first: float | None = None
    text = []
    for line in reply:
        data = line.decode().strip().removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        if first is None:
            first = perf_counter() - start
        text.append(json.loads(data)["choices"][0]["text"])
    total = perf_counter() - start
    return Answer("".join(text), first if first is not None else total, total)
