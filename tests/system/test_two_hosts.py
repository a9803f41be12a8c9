"""Two servers on two hosts share chunks through a Mooncake Store.

The hosts are network namespaces joined by a virtual wire if this machine permits them,
else loopback addresses. Engines reach their server by a Unix socket and shared memory,
as on separate hosts.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcore.client import KVClient
from kvcore.keys import SessionKey
from kvcore.shm import SEGMENT_PREFIX, remove_dead
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
from tests.tiers.store_servers import ProcessEngine, free_port

pytestmark = pytest.mark.tiers

RANKS = 2
_counter = itertools.count()


@dataclass
class Host:
    """A host: its address and the command prefix of its processes."""

    ip: str
    inside: tuple[str, ...] = ()


def run_ip(*arguments: str) -> None:
    """Run `ip`; raises when it refuses."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


def wire(names: list[str]) -> list[Host]:
    """Give each namespace one end of a wire, and an address on it."""
    ends = [f"kv{os.getpid()}-{side}" for side in "ab"]
    run_ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    hosts = [Host(f"10.197.0.{n}", ("ip", "netns", "exec", name))
             for n, name in enumerate(names, 1)]  # fmt: skip
    for host, name, end in zip(hosts, names, ends, strict=True):
        run_ip("link", "set", end, "netns", name)
        run_ip("-n", name, "addr", "add", f"{host.ip}/24", "dev", end)
        for device in (end, "lo"):
            run_ip("-n", name, "link", "set", device, "up")
    return hosts


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """The two hosts."""
    with ExitStack() as stack:
        names = [f"kv-{os.getpid()}-{next(_counter)}" for _ in range(2)]
        try:
            if shutil.which("ip") is None:
                raise OSError("no iproute2")
            for name in names:
                run_ip("netns", "add", name)
                stack.callback(run_ip, "netns", "del", name)
            made = wire(names)
        except (OSError, subprocess.CalledProcessError):
            made = [Host("127.0.0.1"), Host("127.0.0.2")]
        yield made


class Master(ProcessEngine):
    """Mooncake's master on a host; it contributes no memory."""

    def __init__(self, folder: Path, host: Host) -> None:
        super().__init__(folder)
        self.host = host
        self.port = free_port()

    def command(self) -> list[str]:
        """See `ProcessEngine.command`."""
        import mooncake

        return [
            *self.host.inside,
            str(Path(mooncake.__path__[0]) / "mooncake_master"),
            f"--rpc_address={self.host.ip}",
            f"--rpc_port={self.port}",
            f"--metrics_host={self.host.ip}",
            "--metrics_port=0",
        ]

    def ready(self) -> bool:
        """Return whether its port is open in its network namespace."""
        table = Path(f"/proc/{self._pid()}/net/tcp").read_text().splitlines()[1:]
        sockets = [line.split()[1:4:2] for line in table]
        return any(s.endswith(f":{self.port:04X}") and at == "0A" for s, at in sockets)

    def damage(self, *_: Any) -> None:
        """No test here damages a value."""
        raise NotImplementedError

    def tier(self, host: Host) -> tuple[str, ...]:
        """Options of a server on a host, which contributes memory to the store."""
        url = (
            f"mooncake://{self.host.ip}:{self.port}"
            f"?local={host.ip}&segment=32MiB&retry=0.1"
        )
        return ("--tier", url, "--set", "prefetch.deadline_s=10")


@pytest.fixture
def master(tmp_path: Path, hosts: list[Host]) -> Iterator[Master]:
    """A Mooncake master on the first host."""
    master = Master(tmp_path, hosts[0])
    try:
        master.start()
        yield master
    finally:
        master.kill()


def store(
    workers: list[Worker], client: KVClient, tokens: list[int]
) -> list[np.ndarray]:
    """Store a prompt from every rank; return the bytes of each."""
    blocks = chunk_blocks(len(tokens) // CHUNK)
    session = SessionKey("engine", f"writer-{next(_counter)}")
    truth = []
    for rank, worker in enumerate(workers):
        name = f"i{rank}"
        worker.call("store", session, name, 0, len(tokens), [blocks], tokens)
        truth.append(worker.call("read", name, blocks))
    client.end_session(session)
    return truth


def await_written(client: KVClient, num_parts: int) -> None:
    """Wait until the tier has this many of this server's parts."""
    wait_until(lambda: written(client) == num_parts)


def check_served(
    workers: list[Worker],
    client: KVClient,
    model: str,
    tokens: list[int],
    truth: list[np.ndarray],
) -> None:
    """Look a prompt up, retrieve it on every rank, compare each byte."""
    session = SessionKey("engine", f"reader-{next(_counter)}")
    num_chunks = len(tokens) // CHUNK
    assert client.lookup(session, model, RANKS, tokens).num_chunks == num_chunks
    blocks = chunk_blocks(num_chunks, first=8)
    for rank, worker in enumerate(workers):
        name = f"i{rank}"
        worker.call("poison", name, blocks)
        worker.call("retrieve", session, name, 0, len(tokens), [blocks])
        assert np.array_equal(worker.call("read", name, blocks), truth[rank])
    client.end_session(session)


@pytest.fixture
def servers(
    serve: Callable[..., Server], hosts: list[Host], master: Master, tmp_path: Path
) -> list[Server]:
    """One server per host."""
    return [
        serve(
            *master.tier(host),
            address=f"ipc://{tmp_path}/server-{number}",
            prefix=host.inside,
        )
        for number, host in enumerate(hosts)
    ]


def test_what_one_host_stored_the_other_serves(
    servers: list[Server],
    start_worker: Callable[[str], Worker],
    prompt: Prompt,
    model: str,
) -> None:
    """In both directions, for all ranks, byte for byte."""
    with connected(servers[0]) as here, connected(servers[1]) as there:
        clients = [here, there]
        teams = [
            start_workers(start_worker, server, model, PLAIN, RANKS)
            for server in servers
        ]
        for source, target in ((0, 1), (1, 0)):
            tokens = prompt(5 * CHUNK)
            truth = store(teams[source], clients[source], tokens)
            await_written(clients[source], 5 * RANKS)
            before = counter(clients[target], "parts_prefetched")
            check_served(teams[target], clients[target], model, tokens, truth)
            loaded = counter(clients[target], "parts_prefetched") - before
            assert loaded == 5 * RANKS
        stored = [counter(client, "parts_stored") for client in clients]
        assert stored == [5 * RANKS] * 2


def test_a_host_that_dies_takes_only_what_it_held(
    servers: list[Server],
    start_worker: Callable[[str], Worker],
    prompt: Prompt,
    model: str,
) -> None:
    """Its memory in the store is lost: a miss there, never an error or wrong bytes."""
    lost, own = prompt(5 * CHUNK), prompt(3 * CHUNK)
    dying, living = servers
    with connect(dying.address, label="test", timeout_s=20) as client:
        workers = start_workers(start_worker, dying, model, PLAIN, RANKS)
        truth = store(workers, client, lost)
        await_written(client, 5 * RANKS)
        dying.kill()
        # As the next server's start does, possibly in another test.
        remove_dead(f"{SEGMENT_PREFIX}{dying.pid}-")
    with connected(living) as client:
        workers = start_workers(start_worker, living, model, PLAIN, RANKS)
        session = SessionKey("engine", "bereft")
        found = client.lookup(session, model, RANKS, lost).num_chunks
        blocks = chunk_blocks(found)
        for rank, worker in enumerate(workers if found else []):
            worker.call("retrieve", session, f"i{rank}", 0, found * CHUNK, [blocks])
            seen = worker.call("read", f"i{rank}", blocks)
            assert np.array_equal(seen, truth[rank][: len(blocks)])
        client.end_session(session)
        check_served(workers, client, model, own, store(workers, client, own))
        [tier] = client.status().tiers
        assert tier.counters["loaded"] < tier.counters["asked"] == 5 * RANKS
