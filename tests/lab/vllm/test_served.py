"""Scenarios with real engines, with a fake vLLM server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvcore.errors import SetupError, Unavailable
from kvctl.lab.run.environment import detect
from kvctl.lab.vllm import vllm_scenario as served
from kvctl.lab.vllm.vllm_server import VLLMServer
from tests.cli.test_cli import run_in_process

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = ROOT / "scenarios" / "vllm.toml"

FAKE_SERVER = """\
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

METRICS = '''\\
# TYPE vllm:external_prefix_cache_hits_total counter
vllm:external_prefix_cache_hits_total{engine="0"} 40.0
vllm:external_prefix_cache_hits_total{engine="1"} 2.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 1.0
'''

class Handler(BaseHTTPRequestHandler):
    def say(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.say(200, METRICS if self.path == "/metrics" else "")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(body["prompt"]) > 8:
            self.say(400, "too long")
            return
        words = [f"w{token} " for token in body["prompt"]]
        events = [json.dumps({"choices": [{"text": word}]}) for word in words]
        self.say(200, "".join(f"data: {e}\\n\\n" for e in [*events, "[DONE]"]))

    def log_message(self, *rest):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def fake_python(folder: Path, text: str) -> str:
    """Write an executable that replaces a Python with vLLM."""
    script, start = folder / "engine.py", folder / "python"
    script.write_text(text)
    start.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    start.chmod(0o755)
    return str(start)


def test_the_bundled_scenario_has_real_engines() -> None:
    """It has a question and a table `vllm`; other scenarios have no such table."""
    assert served.is_served(SCENARIO)
    assert not served.is_served(ROOT / "scenarios" / "quickstart.toml")
    assert not served.is_served(ROOT / "scenarios" / "missing.toml")
    assert served.read(SCENARIO).question.endswith("?")
    with pytest.raises(SetupError, match=r"vllm\.modle.*vllm\.model"):
        served.read(SCENARIO, ["vllm.modle=x"])


def test_prompts_are_tokens_of_the_model() -> None:
    """Prompts are truncated, and limited in number; they have no special tokens."""
    scenario = served.read(
        SCENARIO, ["max_requests=3", "vllm.max_prompt_tokens=100", "vllm.vocabulary=64"]
    )
    prompts = served._prompts(scenario, seed=0)
    assert [len(prompt) for prompt in prompts] == [100] * 3
    assert {min(p) >= 4 and max(p) < 64 for p in prompts} == {True}


def test_a_scenario_is_explained_without_vllm(tmp_path: Path) -> None:
    """Output has each engine's requests, also those of a trace; a typo is located."""

    def output(*arguments: object) -> str:
        done = run_in_process("inspect", "scenario", *map(str, arguments))
        return done.stdout + done.stderr

    text = output(SCENARIO)
    for part in ("How much faster is vLLM", "chat", "16", "49,152", "tiny-llama"):
        assert part in text
    trace = tmp_path / "one.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 77, "hash_ids": [1]}\n')
    assert "77" in output(SCENARIO, "--trace", trace)
    typo = tmp_path / "typo.toml"
    typo.write_text('[vllm]\nmodle = "x"\n')
    assert "typo.toml:2: unknown key vllm.modle; did you mean vllm.model" in output(
        typo
    )


def test_requests_over_http(tmp_path: Path) -> None:
    """Answers are joined from parts, refusals raise, counters are summed."""
    python = fake_python(tmp_path, FAKE_SERVER)
    server = VLLMServer(python, "model", ["--dtype=float32"], tmp_path / "log")
    try:
        answer = server.complete([5, 6], 2)
        assert answer.text == "w5 w6 "
        assert 0 < answer.first_token_s <= answer.total_s
        with pytest.raises(Unavailable, match="400: too long"):
            server.complete(range(9), 2)
        assert server.counters() == {"external_prefix_cache_hits": 42}
    finally:
        server.stop()


def test_an_engine_that_ends_early_is_a_setup_error(tmp_path: Path) -> None:
    """The error has the end of its log."""
    python = fake_python(tmp_path, "raise SystemExit('no such model')")
    with pytest.raises(SetupError, match="no such model"):
        VLLMServer(python, "model", [], tmp_path / "log")
    with pytest.raises(SetupError, match="/nowhere"):
        VLLMServer("/nowhere", "model", [], tmp_path / "log")


def test_other_answers_are_a_problem(tmp_path: Path) -> None:
    """So is a second engine without hits; a result is shown and saved."""

    def run(name: str, same: int, hits: int) -> served.VLLMRun:
        first = {"p50": 1.0, "p90": 2.0, "mean": 1.5}
        return served.VLLMRun(name, first, 1.0, 100, 0, hits, hits, same)

    def result(second: served.VLLMRun) -> served.VLLMResult:
        runs = (run(served.PLAIN, 4, 0), run(served.FIRST, 4, 0), second)
        scenario = served.read(SCENARIO)
        return served.VLLMResult(1, "vllm", scenario, 0, "now", detect(), runs)

    assert result(run(served.SECOND, 4, 50)).problems == ()
    wrong = result(run(served.SECOND, 3, 0))
    assert len(wrong.problems) == 2
    assert "second: 1 answers differ" in " ".join(map(str, served.build_tables(wrong)))
    assert wrong.save(tmp_path).read_bytes().startswith(b"{")
