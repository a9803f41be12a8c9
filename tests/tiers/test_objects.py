"""Object stores that report full storage or reject credentials."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kvcore.shm import Segment
from kvcore.tiers.tier import LoadOutcome, StoreResult
from kvcore.tiers.tier_url import open_tier
from tests.tiers.part_factory import PAGE, outcome, store_item, view
from tests.tiers.store_servers import S3Engine

pytestmark = pytest.mark.tiers


TERABYTE = 1 << 40


class Full(BaseHTTPRequestHandler):
    """Has nothing and takes nothing; `answer` is how it says so.

    But for a terabyte under every name, which it begins to send.
    """

    answer: tuple[int, str]
    removed: list[str]

    def do_GET(self) -> None:
        """Send some of it."""
        self.send_response(200)
        self.send_header("Content-Length", str(TERABYTE))
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(bytes(1 << 16))

    def do_POST(self) -> None:
        """Note what is deleted."""
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        keys = re.findall(r"<Key>.*?</Key>", asked.decode())
        self.removed += [key[5:-6] for key in keys]
        deleted = "".join(f"<Deleted>{key}</Deleted>" for key in keys)
        self._reply(200, f"<DeleteResult>{deleted}</DeleteResult>")

    def do_HEAD(self) -> None:
        """Nothing is there."""
        self._reply(404, "")

    def do_PUT(self) -> None:
        """Take the bytes, then refuse them."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self._reply(*self.answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def removed() -> list[str]:
    """Objects that were deleted."""
    return []


Serve = Callable[[int, str], str]


@pytest.fixture
def full_store(removed: list[str]) -> Iterator[Serve]:
    """Serve one that answers a PUT so; return its tier's URL."""
    servers: list[ThreadingHTTPServer] = []

    def serve(status: int, text: str) -> str:
        handler = type("Full", (Full,), {"answer": (status, text), "removed": removed})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        return (
            f"s3://bucket?endpoint={endpoint}&access_key_id=a&secret_access_key=b"
            "&retry=30&timeout=5"
        )

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (507, "<Error><Message>Insufficient Storage</Message></Error>"),
        (403, "<Error><Code>QuotaExceeded</Code><Message>no</Message></Error>"),
        (507, "<Error><Code>XMinioStorageFull</Code></Error>"),
    ],
)
def test_a_full_store_is_full_and_stays_up(
    full_store: Serve, arena: Segment, status: int, text: str
) -> None:
    """FULL is no failure: the tier is asked what it has as before."""
    tier = open_tier(full_store(status, text))
    blob = store_item(1, view(arena, 0, PAGE))
    assert tier.store([blob]).result() == [StoreResult.FULL]
    assert tier.contains([blob.key]).result() == [False]
    health = tier.health()
    assert (health.up, health.counters.full, health.counters.failures) == (True, 1, 0)
    tier.close()


def test_an_object_of_another_size_is_not_read(
    full_store: Serve, removed: list[str], arena: Segment
) -> None:
    """An object of the wrong size is removed without being read."""
    tier = open_tier(full_store(507, ""))
    blob = store_item(1, view(arena, 0, PAGE))
    room = view(arena, 32 << 20, PAGE)
    assert outcome(tier, blob.key, room) is LoadOutcome.REJECTED
    assert removed == [str(blob.key)]
    assert tier.health().up
    tier.close()


def test_wrong_credentials_are_a_tier_that_is_down(
    tmp_path: Path, arena: Segment
) -> None:
    """The error contains the store's status and no secret."""
    engine = S3Engine(tmp_path)
    engine.start()
    try:
        tier = open_tier(engine.url.replace("=secret&", "=wrong-one&"))
        blob = store_item(1, view(arena, 0, PAGE))
        assert tier.store([blob]).result() == [StoreResult.FAILED]
        health = tier.health()
        assert not health.up
        assert "403" in health.last_error
        assert "wrong-one" not in f"{health.url} {health.last_error}"
        tier.close()
    finally:
        engine.kill()
