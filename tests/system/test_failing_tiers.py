"""Tiers that fail or hang: misses in time, and other requests are not slowed."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic

import pytest

from kvcore.keys import SessionKey
from tests.system.conftest import Prompt
from tests.system.server_fixture import CHUNK, Server, connect, wait_until
from tests.system.test_tiers import (
    chunk_blocks,
    connected,
    counter,
    start_workers,
    written,
)
from tests.system.worker_process import PLAIN, Worker

DEADLINE_S = 0.5


class Hanging:
    """A Valkey server that accepts connections and never replies."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.accepted: list[socket.socket] = []
        self.thread = threading.Thread(target=self._accept)
        self.thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self.accepted.append(self.listener.accept()[0])

    def close(self) -> None:
        """Close every connection."""
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()
        for connection in self.accepted:
            connection.close()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    """A store that hangs."""
    store = Hanging()
    yield store
    store.close()


@pytest.mark.long
def test_a_hanging_tier_is_a_miss_within_the_deadline(
    serve: Callable[..., Server],
    start_worker: Callable[[str], Worker],
    prompt: Prompt,
    model: str,
    hanging: Hanging,
) -> None:
    """A lookup of it waits until the deadline; pings and hits in L1 do not wait."""
    server = serve(
        "--tier",
        f"valkey://127.0.0.1:{hanging.port}?timeout=3",
        "--set",
        f"prefetch.deadline_s={DEADLINE_S}",
    )
    with connected(server) as client:
        [worker] = start_workers(start_worker, server, model, PLAIN, 1)
        known = prompt(2 * CHUNK)
        stored = SessionKey("engine", "stored")
        worker.call("store", stored, "i0", 0, len(known), [chunk_blocks(2)], known)
        waiting = client.submit_lookup(
            SessionKey("engine", "missing"), model, 1, prompt(2 * CHUNK)
        )
        for number in range(20):
            client.ping()
            session = SessionKey("engine", f"hit-{number}")
            assert client.lookup(session, model, 1, known).num_chunks == 2
            client.end_session(session)
        # All of that was answered while the first one still waited for its tier.
        assert not waiting.done()
        begun = monotonic()
        assert waiting.result(10).num_chunks == 0
        assert monotonic() - begun < 5
        assert counter(client, "prefetches_late") == 1
        client.end_session(SessionKey("engine", "missing"))
        client.end_session(stored)


def test_a_lookup_at_its_deadline_is_answered_before_its_tier(
    serve: Callable[..., Server],
    start_worker: Callable[[str], Worker],
    prompt: Prompt,
    model: str,
    hanging: Hanging,
) -> None:
    """With what L1 has; the prefetch goes on, and its status says so."""
    server = serve(
        "--tier",
        f"valkey://127.0.0.1:{hanging.port}?timeout=10",
        "--set",
        "prefetch.deadline_s=0.05",
    )
    with connected(server) as client:
        [worker] = start_workers(start_worker, server, model, PLAIN, 1)
        tokens = prompt(3 * CHUNK)
        session = SessionKey("engine", "hasty")
        worker.call("store", session, "i0", 0, CHUNK, [chunk_blocks(1)], tokens[:CHUNK])
        assert client.lookup(session, model, 1, tokens).num_chunks == 1
        [job] = client.status().prefetches
        assert (job.request_id, job.state) == ("hasty", "asking")
        assert counter(client, "prefetches_late") == 1
        client.end_session(session)


@pytest.mark.long
def test_a_disk_that_hangs_is_a_miss_at_the_deadline(
    serve: Callable[..., Server],
    start_worker: Callable[[str], Worker],
    prompt: Prompt,
    model: str,
    tmp_path: Path,
) -> None:
    """Hanging reads keep only their reserved pages; other requests are served.

    A read of a pipe that no process writes to never ends.
    """
    tier = ("--tier", f"file://{tmp_path}/tier?timeout=2")
    lost, known = prompt(2 * CHUNK), prompt(CHUNK)
    first = serve(*tier)
    with connected(first) as client:
        [worker] = start_workers(start_worker, first, model, PLAIN, 1)
        session = SessionKey("engine", "writer")
        worker.call("store", session, "i0", 0, len(lost), [chunk_blocks(2)], lost)
        client.end_session(session)
        wait_until(lambda: written(client) == 2)
    assert first.stop() == 0
    second = serve(*tier, "--set", f"prefetch.deadline_s={DEADLINE_S}")
    with connected(second) as client:
        [worker] = start_workers(start_worker, second, model, PLAIN, 1)
        pipes = sorted((tmp_path / "tier").glob("[0-9a-f][0-9a-f]/*"))
        size = sum(path.stat().st_size for path in pipes)
        wait_until(lambda: client.status().tiers[0].used_bytes == size)
        for path in pipes:
            path.unlink()
            os.mkfifo(path)
        session = SessionKey("engine", "reader")
        waiting = client.submit_lookup(session, model, 1, lost)
        wait_until(lambda: client.status().l1.num_reserved == 2)
        hit = SessionKey("engine", "hit")
        worker.call("store", hit, "i0", 0, CHUNK, [chunk_blocks(1)], known)
        assert waiting.result(10).num_chunks == 0
        assert counter(client, "prefetches_late") == 1
        assert client.lookup(hit, model, 1, known).num_chunks == 1
        wait_until(lambda: written(client) == 1)
        assert client.status().l1.num_reserved == 2
        for path in pipes:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        wait_until(lambda: client.status().l1.num_reserved == 0)
        for key in (session, hit):
            client.end_session(key)


def test_a_session_that_ends_does_not_wait_for_its_tier(
    serve: Callable[..., Server],
    start_worker: Callable[[str], Worker],
    prompt: Prompt,
    model: str,
    hanging: Hanging,
) -> None:
    """END_SESSION, a later lookup and a client's end cancel; nothing is leased."""
    server = serve(
        "--tier",
        f"valkey://127.0.0.1:{hanging.port}?timeout=3",
        "--set",
        "prefetch.deadline_s=0.05",
    )
    with connected(server) as client:
        start_workers(start_worker, server, model, PLAIN, 1)
        session = SessionKey("engine", "ends")
        waiting = client.submit_lookup(session, model, 1, prompt(2 * CHUNK))
        wait_until(lambda: client.status().num_prefetches == 1)
        client.end_session(session)
        assert waiting.result(10).num_chunks == 0
        with connect(server.address, timeout_s=20) as leaving:
            leaving.submit_lookup(
                SessionKey("engine", "leaves"), model, 1, prompt(2 * CHUNK)
            )
            wait_until(lambda: client.status().num_prefetches == 1)
        wait_until(lambda: client.status().num_prefetches == 0)
        assert counter(client, "prefetches_cancelled") == 2


def test_a_tier_that_is_gone_is_a_miss_at_once(
    serve: Callable[..., Server],
    start_worker: Callable[[str], Worker],
    prompt: Prompt,
    model: str,
    hanging: Hanging,
) -> None:
    """It is shown as down, and WHY says that it failed."""
    hanging.close()
    server = serve("--tier", f"valkey://127.0.0.1:{hanging.port}?retry=30")
    with connected(server) as client:
        start_workers(start_worker, server, model, PLAIN, 1)
        session = SessionKey("engine", "gone")
        assert client.lookup(session, model, 1, prompt(CHUNK)).num_chunks == 0
        [tier] = client.status().tiers
        assert not tier.up
        assert tier.last_error


def test_a_tier_s_state_is_shown_without_requests(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    """Absent at start and present later: the server is ready and reports both."""
    folder = tmp_path / "tier"
    folder.write_text("in the way")
    server = serve("--tier", f"file://{folder}?retry=0.1")
    with connected(server) as client:
        wait_until(lambda: "Not a directory" in client.status().tiers[0].last_error)
        assert not client.status().tiers[0].up
        folder.unlink()
        wait_until(lambda: client.status().tiers[0].up)
    assert server.stop() == 0
