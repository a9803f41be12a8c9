"""A real vLLM API server: its process, requests over HTTP, its own metrics."""

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
LAST_WORDS = 500


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one prompt."""

    text: str
    first_token_s: float
    total_s: float


class VLLMServer:
    """`vllm.entrypoints.openai.api_server`, ready when this returns.

    In a session of its own, so that Ctrl-C at the terminal reaches only who started it.
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
                raise SetupError(f"vLLM did not start: {self.last_words()}")
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
        """Complete a prompt greedily; times count from the sending.

        Raises:
            Unavailable: vLLM refused or went away.
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
        """Return vLLM's own counters, summed over engines, without their prefix."""
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

    def last_words(self) -> str:
        """Return the end of its log."""
        return self._log.read_text(errors="replace").strip()[-LAST_WORDS:]

    @property
    def pid(self) -> int:
        """Its first process, the leader of the others' group."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until it has ended; it is killed when that takes too long."""
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """Stop it with all its processes."""
        self._signal(signal.SIGINT)
        self.wait()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def _stream(connection: HTTPConnection, body: str) -> Answer:
    begun = perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    reply = connection.getresponse()
    if reply.status != 200:
        raise ValueError(f"{reply.status}: {reply.read()[:LAST_WORDS].decode()}")
    first: float | None = None
    text = []
    for line in reply:
        data = line.decode().strip().removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        if first is None:
            first = perf_counter() - begun
        text.append(json.loads(data)["choices"][0]["text"])
    total = perf_counter() - begun
    return Answer("".join(text), first if first is not None else total, total)
