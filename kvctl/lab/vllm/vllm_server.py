"""A real vLLM API server: its process, requests over HTTP, and metrics."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic, perf_counter, sleep
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from kvcore.errors import SetupError, Unavailable

READY_S = 300.0
POLL_S = 0.2
STOP_S = 30.0
ANSWER_S = 600.0
LOG_TAIL = 500


@dataclass(frozen=True, slots=True)
class Answer:
    """The completion of one prompt, with its latencies."""

    text: str
    first_token_s: float
    total_s: float


class VLLMServer:
    """A process of `vllm.entrypoints.openai.api_server`, ready after construction.

    It has its own process session, so that Ctrl-C does not reach it.
    """

    def __init__(
        self, python: str, model: str, options: Sequence[str], log: Path
    ) -> None:
        self._log = log
        self._model = model
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        command = [python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", model, "--host", "127.0.0.1", "--port", str(self.port)]
        try:
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    [*command, *options],
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    env={
                        "HF_HUB_OFFLINE": "1",
                        **os.environ,
                        "VLLM_NO_USAGE_STATS": "1",
                    },
                )
        except OSError as error:
            raise SetupError(f"python = {python}: {error.strerror}") from None
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _await_ready(self) -> None:
        give_up = monotonic() + READY_S
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise SetupError(f"vLLM did not start: {self.log_tail()}")
            if monotonic() > give_up:
                raise Unavailable(f"vLLM was not ready in {READY_S:.0f} s")
            sleep(POLL_S)

    def _is_healthy(self) -> bool:
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
        """Return the end of the log."""
        return self._log.read_text(errors="replace").strip()[-LOG_TAIL:]

    @property
    def pid(self) -> int:
        """Process id of the leader of the process group."""
        return self._process.pid

    def wait(self) -> None:
        """Wait for the process, and kill it after STOP_S seconds."""
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """Stop all its processes."""
        self._signal(signal.SIGINT)
        self.wait()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


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
