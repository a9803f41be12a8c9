"""`kvctl serve`: start, refusal to start, and stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from socket import create_connection

import pytest

from kvcore.client import KVClient
from kvcore.errors import KVError, Unavailable, UnknownInstance
from kvcore.keys import SessionKey
from tests.system.conftest import Prompt
from tests.system.fork_server import run_command
from tests.system.server_fixture import CHUNK, Server, wait_until
from tests.system.worker_process import LARGE, Worker

STOPS = [signal.SIGINT, signal.SIGTERM]
LONG = pytest.mark.long


def refused(*options: str) -> str:
    """Run a server that cannot start; return its line on stderr."""
    # At level info it may log that it removed a dead server's memory.
    quiet = ("--log-level", "warning")
    ended = run_command("serve", *quiet, *options)
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    return lines[0]


@pytest.mark.parametrize("number", STOPS)
def test_it_stops_cleanly(serve: Callable[..., Server], number: int) -> None:
    """Exit code 0 and nothing left in /dev/shm, with a client connected too."""
    server = serve()
    assert server.segments
    with KVClient(server.address) as client:
        client.ping()
        assert server.stop(number) == 0
        assert not server.segments
        wait_until(lambda: is_unavailable(client))
    server.close()


def is_unavailable(client: KVClient) -> bool:
    """Return whether the client has noticed that its server ended."""
    try:
        return not client.server
    except KVError:
        return True


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=LONG), signal.SIGTERM]
)
def test_it_stops_cleanly_in_the_middle_of_copies(
    serve: Callable[..., Server],
    start_worker: Callable[[str], Worker],
    prompt: Prompt,
    number: int,
) -> None:
    """The running copy ends, queued ones do not begin, each client gets an error."""
    server = serve("--l1-size", "192MiB", "--set", "l1.page=64KiB")
    worker = start_worker(server.address)
    worker.receive()
    worker.call("register", "a", "m", LARGE, num_blocks=32)
    size, blocks = 8 * CHUNK, list(range(32))
    with KVClient(server.address) as client:
        for n in "123":
            key = SessionKey("engine", n)
            worker.call(
                "begin", n, "submit_store", key, "a", 0, size, [blocks], prompt(size)
            )
        wait_until(lambda: client.status().l1.num_chunks > 0)
        assert server.stop(number) == 0
    assert not server.segments
    for n in "123":
        with suppress(Unavailable, UnknownInstance):
            assert worker.call("result", n).num_stored == 8
    server.close()


def test_signals_after_the_first_change_nothing(serve: Callable[..., Server]) -> None:
    """Repeated signals do not leave its memory behind."""
    server = serve()
    for _ in range(3):
        for number in STOPS:
            server.process.send_signal(number)
    assert server.process.wait(20) == 0
    assert not server.segments
    server.close()


def test_a_port_that_is_taken_is_refused(serve: Callable[..., Server]) -> None:
    """One line names the address; the first server continues."""
    server = serve()
    line = refused("--port", server.address.rpartition(":")[2], "--l1-size", "1MiB")
    assert server.address in line
    with KVClient(server.address) as client:
        client.ping()


def test_it_serves_at_a_unix_socket(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    """A second server is refused there; a stop removes the socket file."""
    path = tmp_path / "server.sock"
    address = f"ipc://{path}"
    server = serve(address=address)
    assert server.address == address
    with KVClient(address) as client:
        client.ping()
        assert address in refused("--address", address, "--l1-size", "1MiB")
        client.ping()
    assert server.stop() == 0
    assert not path.exists()
    refused("--address", address, "--l1-size", "100TiB")
    assert not path.exists()
    killed = serve(address=address)
    killed.kill()
    assert path.exists()
    again = serve(address=address)
    with KVClient(address) as client:
        client.ping()
    again.close()
    server.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--l1-size", "100TiB"), "make it smaller"),
        pytest.param(("--set", "l1.eviction=no-such"), "no-such", marks=LONG),
        (("--address", "tcp://192.0.2.1:0", "--l1-size", "1MiB"), "192.0.2.1"),
        (("--address", "ipc:///no/such/folder/s", "--l1-size", "1MiB"), "/no/such"),
        pytest.param(
            ("--address", "ipc:///tmp/" + "s" * 200, "--l1-size", "1MiB"),
            "sss",
            marks=LONG,
        ),
        (("--ready-file", "/no/such/folder/ready", "--l1-size", "1MiB"), "ready_file"),
    ],
)
def test_what_does_not_allow_to_start_is_one_line(
    options: tuple[str, ...], says: str
) -> None:
    """It names the reason, with exit code 2; tests/cli has wrong flags."""
    port = () if "--address" in options else ("--port", "0")
    assert says in refused(*port, *options)


def test_a_dead_servers_memory_is_removed(serve: Callable[..., Server]) -> None:
    """The next server to start removes it, but not a running server's."""
    dead, living = serve(), serve()
    dead.kill()
    assert dead.segments
    after = serve()
    assert not dead.segments
    assert living.segments
    assert after.segments
    for server in (living, after):
        server.close()


def test_two_servers_share_nothing(
    serve: Callable[..., Server], start_worker: Callable[[str], Worker], prompt: Prompt
) -> None:
    """A client of one cannot see the other's instances."""
    one, two = serve(), serve()
    worker = start_worker(one.address)
    worker.receive()
    worker.call("register", "a", "m")
    with KVClient(two.address) as client:
        assert client.status().instances == ()
    for server in (one, two):
        server.close()


def free_port() -> int:
    """Return a port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> dict[str, float]:
    """Read the metrics by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    values = (line.split() for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in values}


def test_metrics_are_served(
    serve: Callable[..., Server], start_worker: Callable[[str], Worker], prompt: Prompt
) -> None:
    """Prometheus text with the counters of STATUS, on this host only."""
    port = free_port()
    server = serve("--metrics-port", str(port))
    worker = start_worker(server.address)
    worker.receive()
    assert scrape(port)["kvcore_stores_total"] == 0
    worker.call("register", "a", "m")
    key = SessionKey("engine", "r")
    worker.call("store", key, "a", 0, CHUNK, [[0, 1, 2, 3]], prompt(CHUNK))
    found = scrape(port)
    assert found["kvcore_stores_total"] == 1
    assert found["kvcore_bytes_stored_total"] == 2 * 2 * CHUNK * 32
    assert found["kvcore_l1_num_chunks"] == 1
    assert found["kvcore_l1_total_bytes"] == 8 << 20
    line = refused("--port", "0", "--metrics-port", str(port), "--l1-size", "1MiB")
    assert str(port) in line
    assert server.stop() == 0
    server.close()


def test_only_what_it_prints_first_is_on_stdout(tmp_path: Path) -> None:
    """`--port 0` takes a free port, which the one line and the ready file name."""
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "kvctl", "serve", "--port", "0"]
    with subprocess.Popen(
        [*command, "--ready-file", str(ready), "--l1-size", "1MiB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = ready.read_text().strip()
        assert address.startswith("tcp://127.0.0.1:")
        assert not address.endswith(":0")
        assert address in line
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""


def test_idle_connections_leave_room_for_clients(serve: Callable[..., Server]) -> None:
    """The server raises the usual limit of open files."""
    server = serve(prefix=("prlimit", "--nofile=128:2048"))
    host, port = server.address.removeprefix("tcp://").split(":")
    with ExitStack() as idle:
        for _ in range(300):
            idle.enter_context(create_connection((host, int(port))))
        with KVClient(server.address, timeout_s=10) as client:
            client.ping()
