"""Valkey server that rejects, redirects and returns wrong values."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvcore.shm import Segment
from kvcore.tiers.tier import LoadOutcome, StoreItem, StoreResult, Tier
from kvcore.tiers.tier_url import open_tier
from tests.tiers.part_factory import (
    PAGE,
    key_of,
    load_checked,
    outcome,
    store_item,
    view,
)
from tests.tiers.store_servers import wait_until

ROOMY = 32 << 20


class FakeValkeyServer:
    """Keeps values as Valkey does, but for the answers that a test gives it."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, bytes] = {}
        """Said to a command of that name instead of the right thing."""
        self.values: dict[bytes, bytes] = {}
        self.asked: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rwb") as stream:
            while line := stream.readline():
                words = []
                for _ in range(int(line[1:])):
                    words.append(stream.read(int(stream.readline()[1:])))
                    stream.readline()
                stream.write(self._answer(words[0].decode(), *words[1:]))
                stream.flush()

    def _answer(self, name: str, *words: bytes) -> bytes:
        self.asked.append(name)
        if name in self.answers:
            return self.answers[name]
        if name == "SET":
            self.values[words[0]] = words[1]
            return b"+OK\r\n"
        if name == "UNLINK":
            removed = [self.values.pop(word, None) is not None for word in words]
            return b":%d\r\n" % sum(removed)
        if name == "EXISTS":
            return b":%d\r\n" % (words[0] in self.values)
        value = self.values.get(words[0])
        return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)

    def close(self) -> None:
        """End, after the clients."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeValkeyServer]:
    """A server."""
    server = FakeValkeyServer(tmp_path / "socket")
    yield server
    server.close()


@pytest.fixture
def tier(store: FakeValkeyServer, tmp_path: Path) -> Iterator[Tier]:
    """A tier on it."""
    tier = open_tier(f"valkey+unix://{tmp_path}/socket?retry=0.02&timeout=10")
    yield tier
    tier.close()


@pytest.fixture
def blob(arena: Segment) -> StoreItem:
    """A part."""
    return store_item(1, view(arena, 0, PAGE))


REFUSALS = [
    "OOM command not allowed when used memory > 'maxmemory'.",
    "READONLY You can't write against a read only replica.",
    "MISCONF Valkey is configured to save RDB snapshots, but it's unable to.",
    "NOREPLICAS Not enough good replicas to write.",
    "NOPERM User kv has no permissions to run the 'set' command",
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_server_that_takes_no_writes_is_read(
    store: FakeValkeyServer,
    tier: Tier,
    arena: Segment,
    blob: StoreItem,
    refusal: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stores are FULL for a while, which the log says once; what is there is served."""
    assert tier.store([blob]).result() == [StoreResult.DONE]
    store.answers["SET"] = f"-{refusal}\r\n".encode()
    new = store_item(2, view(arena, PAGE, PAGE))
    for number in (1, 2):
        wait_until(lambda n=number: _refused(tier, new, store, n), "another try")
    assert load_checked(tier, blob, view(arena, ROOMY, PAGE))
    health = tier.health()
    assert (health.up, health.counters.failures) == (True, 0)
    assert caplog.text.count(refusal) == 1
    store.answers.clear()
    wait_until(
        lambda: tier.store([new]).result() == [StoreResult.DONE], "leave to write"
    )


def _refused(tier: Tier, blob: StoreItem, store: FakeValkeyServer, times: int) -> bool:
    assert tier.store([blob]).result() == [StoreResult.FULL]
    return store.asked.count("SET") == 1 + times


@pytest.mark.parametrize(
    "refusal",
    [
        "LOADING Valkey is loading the dataset in memory",
        "MOVED 3999 127.0.0.1:6381",
        "NOAUTH Authentication required.",
        "ERR max number of clients reached",
        "MASTERDOWN Link with MASTER is down",
    ],
)
@pytest.mark.parametrize("name", ["EXISTS", "GET", "SET"])
def test_a_server_that_refuses_is_down_and_says_why(
    store: FakeValkeyServer,
    tier: Tier,
    arena: Segment,
    blob: StoreItem,
    name: str,
    refusal: str,
) -> None:
    """Whatever it was asked, it is a miss, and the connection is as good as before."""
    assert tier.store([blob]).result() == [StoreResult.DONE]
    store.answers[name] = f"-{refusal}\r\n".encode()
    if name == "EXISTS":
        assert tier.contains([blob.key]).result() == [False]
    elif name == "GET":
        room = view(arena, ROOMY, PAGE)
        assert outcome(tier, blob.key, room) is LoadOutcome.FAILED
    else:
        new = store_item(2, view(arena, PAGE, PAGE))
        assert tier.store([new]).result() == [StoreResult.FAILED]
    assert not tier.health().up
    assert refusal in tier.health().last_error
    store.answers.clear()
    wait_until(lambda: tier.contains([blob.key]).result() == [True], "up again")
    assert load_checked(tier, blob, view(arena, ROOMY, PAGE))


@pytest.mark.parametrize("wrong", ["short", "long", "empty", "other", "zeros"])
def test_a_wrong_value_is_removed_and_its_neighbours_come(
    store: FakeValkeyServer, tier: Tier, arena: Segment, blob: StoreItem, wrong: str
) -> None:
    """Of whatever length; the connection still knows where the next value begins."""
    others = [store_item(n, view(arena, n * PAGE, PAGE)) for n in (0, 2, 3)]
    assert tier.store([*others, blob]).result() == [StoreResult.DONE] * 4
    name = str(blob.key).encode()
    right = store.values[name]
    store.values[name] = {
        "short": right[:-1],
        "long": right + bytes(200_000),
        "empty": b"",
        "other": store.values[str(key_of(2)).encode()],
        "zeros": bytes(len(right)),
    }[wrong]
    assert outcome(tier, blob.key, view(arena, ROOMY, PAGE)) is LoadOutcome.REJECTED
    assert name not in store.values
    for other in others:
        assert load_checked(tier, other, view(arena, ROOMY, PAGE))
    # A value of its own digest, whose payload is another's: only its sum tells.
    store.values[name] = blob.header() + right[len(blob.header()) :][::-1]
    room = view(arena, ROOMY, PAGE)
    assert outcome(tier, blob.key, room) is LoadOutcome.DONE
    assert not load_checked(tier, blob, room)


@pytest.mark.parametrize("answer", [b":1\r\n", b"+OK\r\n", b"?\r\n", b"$x\r\n"])
def test_an_answer_of_another_kind_is_a_failure(
    store: FakeValkeyServer, tier: Tier, arena: Segment, blob: StoreItem, answer: bytes
) -> None:
    """A number for a value, say: no outcome is made up, and it is tried anew."""
    assert tier.store([blob]).result() == [StoreResult.DONE]
    store.answers["GET"] = answer
    room = view(arena, ROOMY, PAGE)
    assert outcome(tier, blob.key, room) is LoadOutcome.FAILED
    assert not tier.health().up
    store.answers.clear()
    wait_until(lambda: load_checked(tier, blob, room), "up again")
