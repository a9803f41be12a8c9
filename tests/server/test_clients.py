"""Who is connected and who still lives, by pidfd or by heartbeat."""

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


class House:
    """A table with a clock of its own, and what it watches."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watched: list[int] = []
        self.table = ClientTable(
            HEARTBEAT_S, self.watched.append, self.watched.remove, lambda: self.now
        )

    def hello(
        self, pid: int, start: int | None = None, namespace: int | None = None
    ) -> Hello:
        """What a process would say."""
        return Hello(
            PROTOCOL_VERSION,
            pid,
            start if start is not None else start_time(pid) or 0,
            namespace if namespace is not None else pid_namespace(),
        )


@pytest.fixture
def house() -> House:
    """An empty table."""
    return House()


def test_a_process_of_this_namespace_is_watched(house: House) -> None:
    """Its pidfd tells at once when it ends, and no heartbeat is needed."""
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    assert process.pid is not None
    client = house.table.add(b"c", house.hello(process.pid))
    assert client.pidfd is not None
    assert house.watched == [client.pidfd]
    assert house.table.by_pidfd(client.pidfd) is client
    poll = select.poll()
    poll.register(client.pidfd, select.POLLIN)
    assert poll.poll(30_000)
    house.now = 1e6
    assert house.table.silent() == []
    assert house.table.next_deadline() is None
    house.table.remove(client)
    assert house.watched == []
    assert len(house.table) == 0
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
    house: House, pid: int, start: int | None, namespace: int | None
) -> None:
    """Silent after four were missed; seen again by any request."""
    client = house.table.add(b"c", house.hello(pid, start, namespace))
    assert client.pidfd is None
    assert house.table.next_deadline() == HEARTBEAT_S
    house.now = MISSED_HEARTBEATS * HEARTBEAT_S
    assert house.table.silent() == []
    house.table.seen(client)
    house.now += MISSED_HEARTBEATS * HEARTBEAT_S
    assert house.table.silent() == []
    house.now += 1
    assert house.table.silent() == [client]
    house.table.remove(client)
    assert house.table.silent() == []
    assert house.table.next_deadline() is None


def test_closing_lets_go_of_everyone(house: House) -> None:
    """And of the descriptors."""
    for n, pid in enumerate((os.getpid(), os.getppid(), os.getpid())):
        house.table.add(b"%d" % n, house.hello(pid))
    assert len(house.watched) == 2
    house.table.close()
    assert (len(house.table), house.watched) == (0, [])


def test_clients_of_one_process_share_a_descriptor(house: House) -> None:
    """However many it has; it is watched until the last of them is forgotten."""
    hello = house.hello(os.getpid())
    clients = [house.table.add(bytes([n]), hello) for n in range(100)]
    assert len(house.watched) == 1
    (pidfd,) = house.watched
    for client in clients:
        assert house.table.by_pidfd(pidfd) is client
        house.table.remove(client)
    assert house.watched == []
    assert house.table.by_pidfd(pidfd) is None
    again = house.table.add(b"again", hello)
    assert house.watched == [again.pidfd]
    house.table.close()
    assert house.watched == []


def test_a_process_has_so_many_clients_and_no_more(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lives and never says goodbye is told; others are entered."""
    monkeypatch.setattr(clients, "MAX_PER_PROCESS", 3)
    hello = house.hello(os.getpid())
    known = [house.table.add(bytes([n]), hello) for n in range(3)]
    with pytest.raises(Overloaded, match=f"process {os.getpid()} has 3 clients"):
        house.table.add(b"more", hello)
    house.table.add(b"other", house.hello(os.getppid()))
    house.table.remove(known[0])
    house.table.add(b"again", hello)
    assert len(house.table) == 4
    house.table.close()
