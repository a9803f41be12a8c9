"""`kvctl inspect` over real servers: reasons of misses, and pending work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcore.client import KVClient
from kvcore.keys import ExtraKey, SessionKey
from tests.cli.test_cli import run_in_process
from tests.system.conftest import Prompt
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.system.test_failing_tiers import Hanging
from tests.system.test_ranks import HYBRID
from tests.system.test_tiers import SMALL, chunk_blocks, connected, start_workers
from tests.system.worker_process import PLAIN, Worker

Serve = Callable[..., Server]
StartWorker = Callable[[str], Worker]
ENGINE = "engine"


def why(server: Server, about: str) -> dict[str, str]:
    """Return the findings of `kvctl inspect why` by code; its table has each code."""
    arguments = ("inspect", "why", about, "--server", server.address)
    done = run_in_process(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)["findings"]
    shown = run_in_process(*arguments).stdout
    assert f"why {about}" in shown
    for finding in findings:
        assert finding["code"] in shown
    return {finding["code"]: finding["message"] for finding in findings}


def store(
    worker: Worker,
    name: str,
    tokens: list[int],
    instance: str = "i0",
    **options: object,
) -> None:
    """Store a prompt from the first blocks."""
    blocks = [chunk_blocks(len(tokens) // CHUNK)]
    session = SessionKey(ENGINE, name)
    worker.call("store", session, instance, 0, len(tokens), blocks, tokens, **options)


def missed(client: KVClient, name: str, model: str, tokens: list[int]) -> int:
    """Look up on one rank, end the session; return the number of chunks found."""
    session = SessionKey(ENGINE, name)
    found = client.lookup(session, model, 1, tokens).num_chunks
    client.end_session(session)
    return found


def test_never_stored(
    serve: Serve, start_worker: StartWorker, prompt: Prompt, model: str
) -> None:
    """A miss names the first missing chunk; an unknown name is refused."""
    server = serve()
    with connected(server) as client:
        [worker] = start_workers(start_worker, server, model, PLAIN, 1)
        tokens = prompt(3 * CHUNK)
        store(worker, "writer", tokens[:CHUNK])
        assert missed(client, "cold", model, tokens) == 1
        findings = why(server, "engine/cold")
        assert [*findings] == ["missed", "never_stored"]
        assert "lookup engine/cold" in findings["missed"]
        assert "1 of 3 chunks" in findings["missed"]
        digits = findings["missed"].rpartition(" ")[2]
        assert why(server, digits)["missed"].endswith(digits)
        assert [*why(server, "no-such")] == ["unknown"]
        client.end_session(SessionKey(ENGINE, "writer"))


def test_evicted_names_the_time_and_the_evicting_request(
    serve: Serve, start_worker: StartWorker, prompt: Prompt, model: str
) -> None:
    """Found by the request that missed and by the chunk's digits; no tier has it."""
    server = serve(*SMALL)
    with connected(server) as client:
        [worker] = start_workers(start_worker, server, model, PLAIN, 1)
        old, new = prompt(4 * CHUNK), prompt(8 * CHUNK)
        for name, tokens in (("writer", old), ("greedy", new)):
            store(worker, name, tokens)
            client.end_session(SessionKey(ENGINE, name))
        assert missed(client, "late", model, old) == 0
        findings = why(server, "late")
        assert [*findings] == ["missed", "evicted"]
        assert "for engine/greedy" in findings["evicted"]
        assert "s ago; no tier had it" in findings["evicted"]
        digits = findings["missed"].rpartition(" ")[2]
        by_chunk = why(server, digits[:12])
        assert "for engine/greedy" in by_chunk["evicted"]


def test_cleared(
    serve: Serve, start_worker: StartWorker, prompt: Prompt, model: str
) -> None:
    """Chunks removed by CLEAR are reported so; present ones with their parts."""
    server = serve()
    with connected(server) as client:
        [worker] = start_workers(start_worker, server, model, PLAIN, 1)
        tokens = prompt(CHUNK)
        store(worker, "writer", tokens)
        client.end_session(SessionKey(ENGINE, "writer"))
        client.clear()
        assert missed(client, "bereft", model, tokens) == 0
        findings = why(server, "bereft")
        assert "dropped by CLEAR" in findings["cleared"]
        digits = findings["missed"].rpartition(" ")[2]
        store(worker, "again", tokens)
        assert "rank 0's part of group 0" in why(server, digits)["present"]
        client.end_session(SessionKey(ENGINE, "again"))


def test_not_all_ranks_other_layout_and_expired(
    serve: Serve, start_worker: StartWorker, prompt: Prompt, model: str
) -> None:
    """One of two ranks stored; then another layout; then an expired lease."""
    server = serve("--set", "sessions.lease_s=0.3")
    with connected(server) as client:
        workers = start_workers(start_worker, server, model, PLAIN, 2)
        tokens, key = prompt(2 * CHUNK), SessionKey(ENGINE, "half")
        store(workers[0], "half", tokens)
        assert client.lookup(key, model, 2, tokens).num_chunks == 0
        assert "rank 1's part of group 0" in why(server, "half")["not_all_ranks"]

        store(workers[1], "half", tokens, "i1")
        assert client.lookup(key, model, 2, tokens).num_chunks == 2
        wait_until(lambda: client.status().num_leases == 0)
        assert "on 2 chunks expired unread" in why(server, "half")["expired"]
        client.end_session(key)

        for rank, worker in enumerate(workers):
            worker.call("unregister_kv_cache", f"i{rank}")
        for rank, worker in enumerate(workers):
            worker.call(
                "register", f"i{rank}", model, HYBRID[1:], rank=rank, world_size=2
            )
        other = SessionKey(ENGINE, "wider")
        assert client.lookup(other, model, 2, tokens).num_chunks == 0
        client.end_session(other)
        assert "in layout" in why(server, "wider")["other_layout"]


@pytest.mark.long
def test_a_tier_that_failed_was_late_or_had_nothing(
    serve: Serve, start_worker: StartWorker, prompt: Prompt, model: str, tmp_path: Path
) -> None:
    """Tiers of three servers: one refuses, one hangs, one is empty."""
    hanging = Hanging()
    silent = f"valkey://127.0.0.1:{hanging.port}?timeout=3"
    expected = {
        "tier_failed": ("--tier", f"valkey+unix://{tmp_path}/absent"),
        "tier_late": ("--tier", silent, "--set", "prefetch.deadline_s=0.2"),
        "tier_missing": ("--tier", f"file://{tmp_path}/tier"),
    }
    try:
        for code, options in expected.items():
            server = serve(*options)
            with connected(server) as client:
                start_workers(start_worker, server, model, PLAIN, 1)
                assert missed(client, "cold", model, prompt(CHUNK)) == 0
                assert [*why(server, "cold")] == ["missed", code, "never_stored"]
    finally:
        hanging.close()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    """A store that hangs."""
    store = Hanging()
    yield store
    store.close()


def test_a_server_s_tables_show_what_is_under_way(
    serve: Serve,
    start_worker: StartWorker,
    prompt: Prompt,
    model: str,
    tmp_path: Path,
    hanging: Hanging,
) -> None:
    """Leases, prefetch jobs, tiers with their queues, quotas."""
    server = serve(
        *("--tier", f"valkey://:secret@127.0.0.1:{hanging.port}?timeout=8&name=slow"),
        *("--tier", f"valkey+unix://{tmp_path}/absent?name=gone&retry=30"),
        *("--set", "prefetch.deadline_s=60"),
        *("--set", 'l1.quotas={"salt:tenant"="1MiB"}'),
    )
    with connected(server) as client:
        [worker] = start_workers(start_worker, server, model, PLAIN, 1)
        tokens = prompt(2 * CHUNK)
        extras = (ExtraKey(0, b'["salt", "tenant"]'),)
        store(worker, "held", tokens, extras=extras)
        key = SessionKey(ENGINE, "held")
        assert client.lookup(key, model, 1, tokens, extras=extras).num_chunks == 2
        waiting = SessionKey(ENGINE, "waiting")
        client.submit_lookup(waiting, model, 1, prompt(3 * CHUNK))
        wait_until(lambda: client.status().num_prefetches == 1)
        wait_until(lambda: not client.status().tiers[1].up)

        shown = run_in_process("inspect", "server", "--server", server.address).stdout
        rows = {
            line.split()[0]: line.split() for line in shown.splitlines() if line.strip()
        }
        assert rows["salt:tenant"] == ["salt:tenant", "16.0", "KiB", "1.0", "MiB", "2%"]
        held = next(line for line in shown.splitlines() if " held " in line)
        assert held.split()[:4] == [ENGINE, "held", model, "2"]
        assert held.split()[-1] == "0"
        job = next(line for line in shown.splitlines() if " waiting " in line)
        assert job.split()[:4] == [ENGINE, "waiting", "asking", "3"]
        assert rows["slow"][1:3] == ["down", "for"]  # It has never answered.
        assert "16.0 KiB" in " ".join(rows["slow"])
        assert rows["gone"][1:3] == ["down", "for"]
        assert "secret" not in shown
        assert rows["failures"][-1] != "0"
        client.end_session(waiting)
        client.end_session(key)
        hanging.close()
