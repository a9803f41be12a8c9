"""What object stores say that only some of them do: full, and not for you."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from engines import S3Engine
from parts import PAGE, blob_of, view

from kvcore.shm import Segment
from kvcore.storage.tiers.contract import Stored
from kvcore.storage.tiers.url import open_tier

pytestmark = pytest.mark.tiers


class Full(BaseHTTPRequestHandler):
    """Has nothing and takes nothing; `answer` is how it says so."""

    answer: tuple[int, str]

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


Serve = Callable[[int, str], str]


@pytest.fixture
def full_store() -> Iterator[Serve]:
    """Serve one that answers a PUT so; return its tier's URL."""
    servers: list[ThreadingHTTPServer] = []

    def serve(status: int, text: str) -> str:
        handler = type("Full", (Full,), {"answer": (status, text)})
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
    blob = blob_of(1, view(arena, 0, PAGE))
    assert tier.store([blob]).result() == [Stored.FULL]
    assert tier.contains([blob.key]).result() == [False]
    health = tier.health()
    assert (health.up, health.counters.full, health.counters.failures) == (True, 1, 0)
    tier.close()


def test_wrong_credentials_are_a_tier_that_is_down(
    tmp_path: Path, arena: Segment
) -> None:
    """It says what the store said, and no secret."""
    engine = S3Engine(tmp_path)
    engine.start()
    try:
        tier = open_tier(engine.url.replace("=secret&", "=wrong-one&"))
        blob = blob_of(1, view(arena, 0, PAGE))
        assert tier.store([blob]).result() == [Stored.FAILED]
        health = tier.health()
        assert not health.up
        assert "403" in health.last_error
        assert "wrong-one" not in f"{health.url} {health.last_error}"
        tier.close()
    finally:
        engine.kill()
