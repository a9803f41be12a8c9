"""`kvctl serve`: ready line, one server per address, clean shutdown."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

import pytest

from kvcore.client import KVClient

STOP_S = 10
Serve = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Yield a function that starts a small server; all are stopped at the end."""
    with ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "kvctl", "serve", "--l1-size", "4MiB"]
            process = stack.enter_context(
                subprocess.Popen(
                    [*command, "--log-level", "warning", *arguments],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def address_of(server: subprocess.Popen[str]) -> str:
    """Read the ready line and return the address in it."""
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("kvctl: ready at tcp://127.0.0.1:"), line
    assert line.endswith(" (L1 4.0 MiB, chunks of 256 tokens)\n")
    return line.split()[3]


def segments(pid: int) -> list[str]:
    """List what a server has in /dev/shm."""
    return [path.name for path in Path("/dev/shm").glob(f"kvcore-{pid}-*")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server(serve: Serve, number: signal.Signals) -> None:
    """One line of output, exit code 0, and nothing left in /dev/shm."""
    server = serve("--port", "0")
    address_of(server)
    assert len(segments(server.pid)) == 1
    server.send_signal(number)
    out, err = server.communicate(timeout=STOP_S)
    assert (server.returncode, out, err) == (0, "", "")
    assert segments(server.pid) == []


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "attempt", [0, *(pytest.param(number, marks=LONG) for number in range(1, 4))]
)
def test_a_signal_right_after_a_request_is_not_lost(serve: Serve, attempt: int) -> None:
    """A signal between a request and the next poll stops the server."""
    server = serve("--port", "0")
    KVClient(address_of(server)).close()
    server.send_signal(signal.SIGTERM)
    assert server.wait(STOP_S) == 0


def test_the_ready_file_holds_the_bound_address(serve: Serve, tmp_path: Path) -> None:
    """The file is complete before the ready line, and removed with the server."""
    path = tmp_path / "address"
    server = serve("--port", "0", "--ready-file", str(path))
    address = address_of(server)
    assert path.read_text() == f"{address}\n"
    with KVClient(address) as client:
        assert client.chunk_size == 256
    server.send_signal(signal.SIGTERM)
    assert server.wait(STOP_S) == 0
    assert not path.exists()


def test_ready_file_of_a_killed_server_is_removed_at_start(
    serve: Serve, tmp_path: Path
) -> None:
    """It must not announce a server that is not ready or cannot start."""
    path = tmp_path / "address"
    path.write_text("tcp://127.0.0.1:1\n")
    server = serve("--address", "tcp://192.0.2.1:1", "--ready-file", str(path))
    server.communicate(timeout=STOP_S)
    assert server.returncode == 2
    assert not path.exists()


def test_metrics_are_served_at_the_configured_host(serve: Serve) -> None:
    """127.0.0.1 by default; a foreign address is an error of one line."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places: tuple[tuple[tuple[str, ...], str], ...] = (
        ((), "127.0.0.1"),
        (("--set", "metrics_host=127.0.0.2"), "127.0.0.2"),
    )
    for flags, host in places:
        server = serve("--port", "0", "--metrics-port", str(port), *flags)
        address_of(server)
        with urlopen(f"http://{host}:{port}/metrics", timeout=STOP_S) as reply:
            assert b"kvcore_l1_total_bytes 4.194304e+06" in reply.read()
        server.send_signal(signal.SIGTERM)
        assert server.wait(STOP_S) == 0
    elsewhere = "metrics_host=192.0.2.1"
    server = serve("--port", "0", "--metrics-port", str(port), "--set", elsewhere)
    _, err = server.communicate(timeout=STOP_S)
    assert server.returncode == 2
    assert err.startswith(f"kvctl: cannot serve metrics at 192.0.2.1:{port}: ")


def test_a_second_server_at_an_address_is_refused(serve: Serve) -> None:
    """One line that names the address, exit code 2; the first server continues."""
    address = address_of(serve("--port", "0"))
    second = serve("--address", address)
    out, err = second.communicate(timeout=STOP_S)
    assert (second.returncode, out) == (2, "")
    assert err.startswith(f"kvctl: cannot serve at {address}: Address already in use")
    assert err.count("\n") == 1
    with KVClient(address) as client:
        client.ping()


def test_a_file_at_the_path_of_a_unix_socket_is_kept(
    serve: Serve, tmp_path: Path
) -> None:
    """Only a socket may be taken over; the error names the path."""
    path = tmp_path / "thesis.txt"
    path.write_text("precious")
    server = serve("--address", f"ipc://{path}")
    _, err = server.communicate(timeout=STOP_S)
    assert server.returncode == 2
    assert f"{path} exists and is not a socket" in err
    assert err.count("\n") == 1
    assert path.read_text() == "precious"


def test_a_ready_file_that_cannot_be_written_is_an_error(serve: Serve) -> None:
    """The server stops and leaves nothing in /dev/shm."""
    server = serve("--port", "0", "--ready-file", "/nowhere/address")
    _, err = server.communicate(timeout=STOP_S)
    assert server.returncode == 2
    assert err == "kvctl: ready_file = /nowhere/address: No such file or directory\n"
    assert segments(server.pid) == []


def test_a_missing_gpu_is_one_line(serve: Serve) -> None:
    """Exit code 2 without the bindings, the driver or the GPU."""
    server = serve("--port", "0", "--device", "cuda")
    out, err = server.communicate(timeout=STOP_S)
    if server.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert server.returncode == 2
    assert out == ""
    assert err.startswith("kvctl: device = cuda: ")
    assert err.count("\n") == 1
    assert segments(server.pid) == []


@pytest.mark.parametrize("device", ["auto", pytest.param("cpu", marks=LONG)])
def test_host_memory_needs_no_gpu(serve: Serve, device: str) -> None:
    """Both serve, without a message about GPUs."""
    server = serve("--port", "0", "--device", device)
    address_of(server)
    server.send_signal(signal.SIGTERM)
    _, err = server.communicate(timeout=STOP_S)
    assert (server.returncode, err) == (0, "")
