"""The client table: liveness by pidfd or by heartbeat."""

from __future__ import annotations

import multiprocessing
import os
import select

import pytest

from kvcore.errors import Overloaded
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import PROTOCOL_VERSION, Hello
from kvcore.server import client_table as clients
from kvcore.server.client_table import MISSED_HEARTBEATS, ClientTable

HEARTBEAT_S = 5.0


class ClientTableFixture:
    """A client table, its clock, and the descriptors that it watches."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watched: list[int] = []
        self.table = ClientTable(
            HEARTBEAT_S, self.watched.append, self.watched.remove, lambda: self.now
        )

    def hello(
        self, pid: int, start: int | None = None, namespace: int | None = None
    ) -> Hello:
        """Return the HELLO of a process."""
        return Hello(
            PROTOCOL_VERSION,
            pid,
            start if start is not None else start_time(pid) or 0,
            namespace if namespace is not None else pid_namespace(),
        )


@pytest.fixture
def fixture() -> ClientTableFixture:
    """An empty table."""
    return ClientTableFixture()


def test_a_process_of_this_namespace_is_watched(fixture: ClientTableFixture) -> None:
    """Its pidfd reports its end at once; it needs no heartbeats."""
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    assert process.pid is not None
    client = fixture.table.add(b"c", fixture.hello(process.pid))
    assert client.pidfd is not None
    assert fixture.watched == [client.pidfd]
    assert fixture.table.by_pidfd(client.pidfd) is client
    poll = select.poll()
    poll.register(client.pidfd, select.POLLIN)
    assert poll.poll(30_000)
    fixture.now = 1e6
    assert fixture.table.silent() == []
    assert fixture.table.next_deadline() is None
    fixture.table.remove(client)
    assert fixture.watched == []
    assert len(fixture.table) == 0
    process.join()


@pytest.mark.parametrize(
    ("pid", "start", "namespace"),
    [
        (os.getpid(), 1, None),  # another process has that number by now
        (os.getpid(), None, 1),  # another namespace
        (1 << 22, 1, None),  # nobody
        (0, 0, None),
        (1 << 40, 1, None),
    ],
    ids=["other start", "other namespace", "nobody", "zero", "no pid"],
)
def test_any_other_lives_by_its_heartbeats(
    fixture: ClientTableFixture, pid: int, start: int | None, namespace: int | None
) -> None:
    """It is silent after four missed heartbeats; any request counts as one."""
    client = fixture.table.add(b"c", fixture.hello(pid, start, namespace))
    assert client.pidfd is None
    assert fixture.table.next_deadline() == HEARTBEAT_S
    fixture.now = MISSED_HEARTBEATS * HEARTBEAT_S
    assert fixture.table.silent() == []
    fixture.table.seen(client)
    fixture.now += MISSED_HEARTBEATS * HEARTBEAT_S
    assert fixture.table.silent() == []
    fixture.now += 1
    assert fixture.table.silent() == [client]
    fixture.table.remove(client)
    assert fixture.table.silent() == []
    assert fixture.table.next_deadline() is None


def test_close_removes_every_client(fixture: ClientTableFixture) -> None:
    """Its descriptors are closed, too."""
    for n, pid in enumerate((os.getpid(), os.getppid(), os.getpid())):
        fixture.table.add(b"%d" % n, fixture.hello(pid))
    assert len(fixture.watched) == 2
    fixture.table.close()
    assert (len(fixture.table), fixture.watched) == (0, [])


def test_clients_of_one_process_share_a_descriptor(fixture: ClientTableFixture) -> None:
    """The process is watched until its last client is removed."""
    hello = fixture.hello(os.getpid())
    clients = [fixture.table.add(bytes([n]), hello) for n in range(100)]
    assert len(fixture.watched) == 1
    (pidfd,) = fixture.watched
    for client in clients:
        assert fixture.table.by_pidfd(pidfd) is client
        fixture.table.remove(client)
    assert fixture.watched == []
    assert fixture.table.by_pidfd(pidfd) is None
    again = fixture.table.add(b"again", hello)
    assert fixture.watched == [again.pidfd]
    fixture.table.close()
    assert fixture.watched == []


def test_a_process_has_so_many_clients_and_no_more(
    fixture: ClientTableFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the limit; clients of other processes are accepted."""
    monkeypatch.setattr(clients, "MAX_PER_PROCESS", 3)
    hello = fixture.hello(os.getpid())
    known = [fixture.table.add(bytes([n]), hello) for n in range(3)]
    with pytest.raises(Overloaded, match=f"process {os.getpid()} has 3 clients"):
        fixture.table.add(b"more", hello)
    fixture.table.add(b"other", fixture.hello(os.getppid()))
    fixture.table.remove(known[0])
    fixture.table.add(b"again", hello)
    assert len(fixture.table) == 4
    fixture.table.close()
