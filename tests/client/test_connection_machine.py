"""A connection in any order of events: every request ends once, and rightly."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import zmq

from kvcore.client import KVClient
from kvcore.errors import (
    BadRequest,
    Closed,
    DeadlineExceeded,
    Internal,
    KVError,
    StaleBoot,
    TokensNeeded,
    Unavailable,
)
from kvcore.keys import HASH_ALGORITHM, SessionKey
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import (
    PROTOCOL_VERSION,
    BootToken,
    Goodbye,
    Hello,
    HelloReply,
    Lookup,
    LookupReply,
    Ping,
    Pong,
    RegisterKVCache,
    RegisterReply,
    Request,
    Retrieve,
    RetrieveReply,
)
from kvcore.wire import decode_envelope, decode_request, encode_error, encode_reply

ENDS = (
    BadRequest,
    Closed,
    DeadlineExceeded,
    Internal,
    StaleBoot,
    TokensNeeded,  # Of the last time that it is sent; else they are sent.
    Unavailable,
)
"""What a request may end with here."""
INSTANCES = ("a", "b")
SOON_S = 0.15


class Run:
    """One run of a server, which answers as its dice fall."""

    def __init__(
        self, address: str, boot: int, seed: int, log: list[list[str]]
    ) -> None:
        self.boot = BootToken(boot)
        self.is_calm = threading.Event()
        self._dice = random.Random(seed)
        self._log = log
        self._knows: set[bytes] = set()
        self._later: list[list[bytes]] = []
        self._process = Popen(["sleep", "1000"])
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(5):
                identity, frame = self._socket.recv_multipart()
                for answer in self._answers(identity, frame):
                    self._socket.send_multipart([identity, answer])
            elif self._later:
                which = self._dice.randrange(len(self._later))
                self._socket.send_multipart(self._later.pop(which))

    def _answers(self, identity: bytes, frame: bytes) -> list[bytes]:
        envelope = decode_envelope(frame)
        _, request = decode_request(envelope)
        number = envelope.id
        if isinstance(request, Hello):
            self._knows.add(identity)
            self._log.append([])
            return [encode_reply(number, self._hello())] * self._dice.choice((1, 1, 2))
        if identity not in self._knows or envelope.boot != self.boot:
            return [encode_error(number, StaleBoot("of another run"))]
        self._log[-1].append(_named(request))
        if self.is_calm.is_set() or isinstance(request, RegisterKVCache):
            return [_right(number, request)]
        return self._diced(identity, number, request, frame)

    def _diced(
        self, identity: bytes, number: int, request: Request[Any], frame: bytes
    ) -> list[bytes]:
        match self._dice.randrange(12):
            case 0:
                return []
            case 1:
                return [_right(number, request)] * 2
            case 2:
                self._knows.discard(identity)
                return [encode_error(number, StaleBoot("forgotten"))]
            case 3:
                error = KVError("odd", message=1, have="x")
                return [encode_error(number, error)]
            case 4:
                wrong = encode_reply(number + 1000, Pong(0))
                return [wrong, b"", b"\xc1junk", frame, _right(number, request)]
            case 5:
                return [encode_reply(number, RegisterReply((), 0))]
            case 6 | 7 | 8:
                self._later.append([identity, _right(number, request)])
                return []
        return [_right(number, request)]

    def _hello(self) -> HelloReply:
        pid = self._process.pid
        return HelloReply(
            protocol_version=PROTOCOL_VERSION,
            boot=self.boot,
            chunk_size=64,
            hash_algorithm=HASH_ALGORITHM,
            pid=pid,
            pid_start=start_time(pid) or 0,
            pid_namespace=pid_namespace(),
            watched=True,
            heartbeat_s=5,
            max_message_bytes=1 << 20,
        )

    def leave(self) -> None:
        """Give up the address, while the process lives on."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._socket.close()
            self._context.term()

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def _named(request: Request[Any]) -> str:
    if isinstance(request, RegisterKVCache):
        return f"register {request.instance_id}"
    return type(request).__name__


def _right(number: int, request: Request[Any]) -> bytes:
    if isinstance(request, Lookup) and not request.tokens:
        return encode_error(number, TokensNeeded("tell me", have=0))
    if isinstance(request, Lookup):
        return encode_reply(number, LookupReply(request.end // 64, request.end))
    if isinstance(request, Retrieve):
        return encode_reply(number, RetrieveReply(request.end))
    if isinstance(request, RegisterKVCache):
        return encode_reply(number, RegisterReply((), 0))
    return encode_reply(number, Pong(7))


class Asked:
    """What was asked, and how it ended."""

    def __init__(self, want: Any) -> None:
        self.want = want
        self.ends: list[Any] = []

    def ended(self, future: Future[Any]) -> None:
        """Note how a future ended."""
        self.ends.append(future.exception() or future.result())

    def check(self) -> None:
        """It ended once, rightly."""
        assert len(self.ends) == 1
        end = self.ends[0]
        if isinstance(end, BaseException):
            assert isinstance(end, ENDS), repr(end)
        else:
            assert end == self.want


class Play:
    """A client, the runs of its server, and what was asked."""

    def __init__(self, address: str, seed: int) -> None:
        self.address = address
        self.seed = seed
        self.dice = random.Random(seed)
        self.log: list[list[str]] = []
        self.runs: list[Run] = []
        self.asked: list[Asked] = []
        self.threads: list[threading.Thread] = []
        self.begin()
        self.client = KVClient(address, timeout_s=20)
        for instance in INSTANCES:
            request = RegisterKVCache(instance, "e", "m", 1, 0, (), ())
            self.client.register_kv_cache(request)
        self.log.clear()
        self.log.append(["register a", "register b"])

    def begin(self) -> None:
        """Start another run."""
        boot = len(self.runs) + 1
        run = Run(self.address, boot, 1000 * self.seed + boot, self.log)
        if not self.runs:
            run.is_calm.set()
        self.runs.append(run)

    def _request(self, number: int) -> tuple[Request[Any], Any, float]:
        key = SessionKey("e", f"r{number}")
        end = 64 * number
        match self.dice.randrange(5):
            case 0 | 1:
                return Ping(), Pong(7), SOON_S
            case 2:
                return Retrieve(key, "a", 0, end, ()), RetrieveReply(end), SOON_S
        return Lookup(key, "m", 1, end), LookupReply(number, end), SOON_S

    def _again(self, request: Request[Any]) -> Callable[[KVError], Any]:
        def again(error: KVError) -> Request[Any] | None:
            if not isinstance(error, TokensNeeded) or not isinstance(request, Lookup):
                return None
            packed = memoryview(bytes(4 * request.end))
            return Lookup(request.session, "m", 1, request.end, packed)

        return again

    def ask(self, close: bool = False) -> None:
        """Submit, or call in a thread; `close` has a future's callback do so."""
        request, want, timeout_s = self._request(len(self.asked) + 1)
        asked = Asked(want)
        again = self._again(request)
        self.asked.append(asked)
        if close or self.dice.random() < 0.5:
            future = self.client.submit(request, timeout_s, again)
            future.add_done_callback(asked.ended)
            if close:
                future.add_done_callback(lambda _: self.client.close())
            return

        def call() -> None:
            try:
                asked.ends.append(self.client.call(request, timeout_s, again))
            except BaseException as error:  # noqa: BLE001 - looked at in `check`
                asked.ends.append(error)

        self.threads.append(threading.Thread(target=call, daemon=True))
        self.threads[-1].start()

    def replace(self) -> None:
        """Have another run at the address; the process of this one ends, or not."""
        run = self.runs[-1]
        what = self.dice.randrange(3)
        if what == 0:
            run.end()
        run.leave()
        if what == 1:
            run.end()
        self.begin()

    def play(self) -> None:
        """Do anything, and then close."""
        for _ in range(self.dice.randrange(5, 60)):
            if self.dice.random() < 0.06:
                self.replace()
            else:
                self.ask()
            if self.dice.random() < 0.1 and self.threads:
                self.threads[-1].join(SOON_S)
        if self.dice.random() < 0.3:
            for run in self.runs:
                run.end()
        if self.dice.random() < 0.5:
            self.ask(close=True)
        elif self.dice.random() < 0.5:
            for thread in self.threads:
                thread.join(SOON_S)

    def close(self) -> None:
        """Close, and wait for all threads."""
        closers = [
            threading.Thread(target=self.client.close, daemon=True) for _ in range(2)
        ]
        for thread in closers:
            thread.start()
        for thread in [*closers, *self.threads]:
            thread.join(20)
            assert not thread.is_alive()

    def end(self) -> None:
        """End all runs."""
        for run in self.runs:
            run.leave()
            run.end()

    def check(self) -> None:
        """Hold what was asked, and what every run was told, to the contract."""
        for asked in self.asked:
            asked.check()
        wanted = [f"register {instance}" for instance in INSTANCES]
        for told in self.log:
            told = [name for name in told if name != Goodbye.__name__]
            if told[len(INSTANCES) - 1 :]:
                assert told[: len(INSTANCES)] == wanted
            assert sum(name in wanted for name in told) <= len(INSTANCES)


def _opened() -> set[tuple[str, str]]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # What lists the folder.
            found.add((fd.name, os.readlink(fd)))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events(tmp_path: Path, seed: int) -> None:
    """Each request ends once, each run is registered with once, nothing is left."""
    opened, num_threads = _opened(), threading.active_count()
    play = Play(f"ipc://{tmp_path}/played", seed)
    try:
        play.play()
        play.close()
    finally:
        play.end()
    play.check()
    assert not _opened() - opened
    assert threading.active_count() == num_threads
