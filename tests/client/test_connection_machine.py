"""Connection under random events: every request completes once, with a valid result."""

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

EXPECTED_ERRORS = (
    BadRequest,
    Closed,
    DeadlineExceeded,
    Internal,
    StaleBoot,
    TokensNeeded,  # On the last send; earlier ones are retried with the tokens.
    Unavailable,
)
"""The errors that a request may fail with."""
INSTANCES = ("a", "b")
SHORT_TIMEOUT_S = 0.15


class RandomServer:
    """A server process that replies at random: late, twice, wrongly or never."""

    def __init__(
        self, address: str, boot: int, seed: int, log: list[list[str]]
    ) -> None:
        self.boot = BootToken(boot)
        self.is_reliable = threading.Event()
        self._random = random.Random(seed)
        self._log = log
        self._known_clients: set[bytes] = set()
        self._delayed_replies: list[list[bytes]] = []
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
                for answer in self._replies(identity, frame):
                    self._socket.send_multipart([identity, answer])
            elif self._delayed_replies:
                which = self._random.randrange(len(self._delayed_replies))
                self._socket.send_multipart(self._delayed_replies.pop(which))

    def _replies(self, identity: bytes, frame: bytes) -> list[bytes]:
        envelope = decode_envelope(frame)
        _, request = decode_request(envelope)
        request_id = envelope.id
        if isinstance(request, Hello):
            self._known_clients.add(identity)
            self._log.append([])
            return [encode_reply(request_id, self._hello())] * self._random.choice(
                (1, 1, 2)
            )
        if identity not in self._known_clients or envelope.boot != self.boot:
            return [encode_error(request_id, StaleBoot("of another server"))]
        self._log[-1].append(_request_name(request))
        if self.is_reliable.is_set() or isinstance(request, RegisterKVCache):
            return [_correct_reply(request_id, request)]
        return self._random_replies(identity, request_id, request, frame)

    def _random_replies(
        self, identity: bytes, request_id: int, request: Request[Any], frame: bytes
    ) -> list[bytes]:
        match self._random.randrange(12):
            case 0:
                return []
            case 1:
                return [_correct_reply(request_id, request)] * 2
            case 2:
                self._known_clients.discard(identity)
                return [encode_error(request_id, StaleBoot("forgotten"))]
            case 3:
                error = KVError("odd", message=1, have="x")
                return [encode_error(request_id, error)]
            case 4:
                wrong = encode_reply(request_id + 1000, Pong(0))
                return [
                    wrong,
                    b"",
                    b"\xc1junk",
                    frame,
                    _correct_reply(request_id, request),
                ]
            case 5:
                return [encode_reply(request_id, RegisterReply((), 0))]
            case 6 | 7 | 8:
                self._delayed_replies.append(
                    [identity, _correct_reply(request_id, request)]
                )
                return []
        return [_correct_reply(request_id, request)]

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

    def unbind(self) -> None:
        """Stop serving the address; the process keeps running."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._socket.close()
            self._context.term()

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()


def _request_name(request: Request[Any]) -> str:
    if isinstance(request, RegisterKVCache):
        return f"register {request.instance_id}"
    return type(request).__name__


def _correct_reply(request_id: int, request: Request[Any]) -> bytes:
    if isinstance(request, Lookup) and not request.tokens:
        return encode_error(request_id, TokensNeeded("tokens needed", have=0))
    if isinstance(request, Lookup):
        return encode_reply(request_id, LookupReply(request.end // 64, request.end))
    if isinstance(request, Retrieve):
        return encode_reply(request_id, RetrieveReply(request.end))
    if isinstance(request, RegisterKVCache):
        return encode_reply(request_id, RegisterReply((), 0))
    return encode_reply(request_id, Pong(7))


class ExpectedResult:
    """The expected reply of one request, and its recorded results."""

    def __init__(self, expected: Any) -> None:
        self.expected = expected
        self.results: list[Any] = []

    def record(self, future: Future[Any]) -> None:
        """Record the result of a future."""
        self.results.append(future.exception() or future.result())

    def check(self) -> None:
        """Assert one result: the expected reply or an expected error."""
        assert len(self.results) == 1
        end = self.results[0]
        if isinstance(end, BaseException):
            assert isinstance(end, EXPECTED_ERRORS), repr(end)
        else:
            assert end == self.expected


class Scenario:
    """A client, its successive servers, and the expected results."""

    def __init__(self, address: str, seed: int) -> None:
        self.address = address
        self.seed = seed
        self.random = random.Random(seed)
        self.log: list[list[str]] = []
        self.servers: list[RandomServer] = []
        self.expected_results: list[ExpectedResult] = []
        self.threads: list[threading.Thread] = []
        self.start_server()
        self.client = KVClient(address, timeout_s=20)
        for instance in INSTANCES:
            request = RegisterKVCache(instance, "e", "m", 1, 0, (), ())
            self.client.register_kv_cache(request)
        self.log.clear()
        self.log.append(["register a", "register b"])

    def start_server(self) -> None:
        """Start another server process at the address."""
        boot = len(self.servers) + 1
        server = RandomServer(self.address, boot, 1000 * self.seed + boot, self.log)
        if not self.servers:
            server.is_reliable.set()
        self.servers.append(server)

    def _request(self, request_id: int) -> tuple[Request[Any], Any, float]:
        key = SessionKey("e", f"r{request_id}")
        end = 64 * request_id
        match self.random.randrange(5):
            case 0 | 1:
                return Ping(), Pong(7), SHORT_TIMEOUT_S
            case 2:
                return (
                    Retrieve(key, "a", 0, end, ()),
                    RetrieveReply(end),
                    SHORT_TIMEOUT_S,
                )
        return Lookup(key, "m", 1, end), LookupReply(request_id, end), SHORT_TIMEOUT_S

    def _retry(self, request: Request[Any]) -> Callable[[KVError], Any]:
        def retry(error: KVError) -> Request[Any] | None:
            if not isinstance(error, TokensNeeded) or not isinstance(request, Lookup):
                return None
            packed = memoryview(bytes(4 * request.end))
            return Lookup(request.session, "m", 1, request.end, packed)

        return retry

    def send(self, close: bool = False) -> None:
        """Submit, or call in a thread; with `close`, a callback closes the client."""
        request, expected, timeout_s = self._request(len(self.expected_results) + 1)
        expected_result = ExpectedResult(expected)
        retry = self._retry(request)
        self.expected_results.append(expected_result)
        if close or self.random.random() < 0.5:
            future = self.client.submit(request, timeout_s, retry)
            future.add_done_callback(expected_result.record)
            if close:
                future.add_done_callback(lambda _: self.client.close())
            return

        def call() -> None:
            try:
                expected_result.results.append(
                    self.client.call(request, timeout_s, retry)
                )
            except BaseException as error:  # noqa: BLE001 - asserted in `check`
                expected_result.results.append(error)

        self.threads.append(threading.Thread(target=call, daemon=True))
        self.threads[-1].start()

    def replace_server(self) -> None:
        """Bind another server to the address; this one's process may keep running."""
        server = self.servers[-1]
        what = self.random.randrange(3)
        if what == 0:
            server.kill()
        server.unbind()
        if what == 1:
            server.kill()
        self.start_server()

    def run(self) -> None:
        """Send requests and replace servers at random."""
        for _ in range(self.random.randrange(5, 60)):
            if self.random.random() < 0.06:
                self.replace_server()
            else:
                self.send()
            if self.random.random() < 0.1 and self.threads:
                self.threads[-1].join(SHORT_TIMEOUT_S)
        if self.random.random() < 0.3:
            for server in self.servers:
                server.kill()
        if self.random.random() < 0.5:
            self.send(close=True)
        elif self.random.random() < 0.5:
            for thread in self.threads:
                thread.join(SHORT_TIMEOUT_S)

    def close(self) -> None:
        """Close the client in two threads at once, and join all threads."""
        closers = [
            threading.Thread(target=self.client.close, daemon=True) for _ in range(2)
        ]
        for thread in closers:
            thread.start()
        for thread in [*closers, *self.threads]:
            thread.join(20)
            assert not thread.is_alive()

    def kill(self) -> None:
        """Stop all servers."""
        for server in self.servers:
            server.unbind()
            server.kill()

    def check(self) -> None:
        """Check every result, and the requests that every server received."""
        for expected_result in self.expected_results:
            expected_result.check()
        registrations = [f"register {instance}" for instance in INSTANCES]
        for received in self.log:
            names = [name for name in received if name != Goodbye.__name__]
            if names[len(INSTANCES) - 1 :]:
                assert names[: len(INSTANCES)] == registrations
            assert sum(name in registrations for name in names) <= len(INSTANCES)


def _open_files() -> set[tuple[str, str]]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # What lists the folder.
            found.add((fd.name, os.readlink(fd)))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events(tmp_path: Path, seed: int) -> None:
    """Requests complete once, registrations are sent once, nothing leaks."""
    open_before, num_threads = _open_files(), threading.active_count()
    scenario = Scenario(f"ipc://{tmp_path}/scripted", seed)
    try:
        scenario.run()
        scenario.close()
    finally:
        scenario.kill()
    scenario.check()
    assert not _open_files() - open_before
    assert threading.active_count() == num_threads
