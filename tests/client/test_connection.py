"""Connection against a scripted server: replies that real servers rarely send."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
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
    KVError,
    StaleBoot,
    Unavailable,
)
from kvcore.keys import HASH_ALGORITHM, SessionKey
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import (
    PROTOCOL_VERSION,
    BootToken,
    Done,
    EndSession,
    Goodbye,
    Hello,
    HelloReply,
    Ping,
    Pong,
    RegisterKVCache,
    RegisterReply,
    Request,
    Retrieve,
)
from kvcore.wire import decode_envelope, decode_request, encode_error, encode_reply

KEY = SessionKey("e", "r")


class ScriptedServer:
    """A server on a thread whose replies a test sets.

    `answers` maps a request class to a reply, an error, a raw frame, or None for no
    reply.
    """

    def __init__(self, address: str, *, watched: bool = True) -> None:
        self.address = address
        self.watched = watched
        self.namespace = pid_namespace() if watched else 0
        self.heartbeat_s = 0.02
        self.pid = os.getpid()
        self.boot = BootToken(1)
        self.boots: dict[type[Request[Any]], BootToken] = {}
        """Boot tokens that take effect at the first request of a class."""
        self.seen: list[Request[Any]] = []
        self.changed = threading.Condition()
        self.answers: dict[type[Request[Any]], Any] = {
            Ping: Pong(0),
            EndSession: Done(),
            RegisterKVCache: RegisterReply((), 0),
        }
        self.is_paused = threading.Event()
        self._delayed_replies: deque[list[bytes]] = deque()
        self._unanswered: dict[type[Request[Any]], tuple[bytes, int]] = {}
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._stop = threading.Event()
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            while self._delayed_replies:
                self._socket.send_multipart(self._delayed_replies.popleft())
            if self.is_paused.is_set():
                self._stop.wait(0.01)
                continue
            if not self._socket.poll(20):
                continue
            identity, frame = self._socket.recv_multipart()
            envelope = decode_envelope(frame)
            _, request = decode_request(envelope)
            self.boot = self.boots.pop(type(request), self.boot)
            if isinstance(request, Hello):
                answer = self.answers.get(Hello, self.hello())
            elif envelope.boot != self.boot:
                answer = StaleBoot("of another server")
            else:
                answer = self.answers.get(type(request))
            with self.changed:
                self.seen.append(request)
                self.changed.notify_all()
            if answer is None:
                self._unanswered[type(request)] = (identity, envelope.id)
                continue
            if isinstance(answer, KVError):
                answer = encode_error(envelope.id, answer)
            elif not isinstance(answer, bytes):
                answer = encode_reply(envelope.id, answer)
            self._socket.send_multipart([identity, answer])

    def answer(self, kind: type[Request[Any]], reply: Any) -> None:
        """Reply to the last unanswered request of a class."""
        identity, request_id = self._unanswered[kind]
        self._delayed_replies.append([identity, encode_reply(request_id, reply)])

    def hello(self) -> HelloReply:
        """Return the handshake reply."""
        return HelloReply(
            protocol_version=PROTOCOL_VERSION,
            boot=self.boot,
            chunk_size=64,
            hash_algorithm=HASH_ALGORITHM,
            pid=self.pid,
            pid_start=start_time(self.pid) or 0,
            pid_namespace=self.namespace,
            watched=self.watched,
            heartbeat_s=self.heartbeat_s,
            max_message_bytes=1 << 20,
        )

    def wait_for(self, kind: type[Request[Any]], count: int = 1) -> None:
        """Wait until `count` requests of a class have arrived."""
        with self.changed:
            has_arrived = self.changed.wait_for(
                lambda: sum(isinstance(s, kind) for s in self.seen) >= count, 20
            )
        assert has_arrived, self.names()

    def names(self) -> list[str]:
        """Return the class names of the received requests, in order."""
        return [type(request).__name__ for request in self.seen]

    def close(self) -> None:
        """Stop the thread and close the socket."""
        self._stop.set()
        self._thread.join()
        self._socket.close()


@pytest.fixture
def scripted_server(tmp_path: Path) -> Iterator[ScriptedServer]:
    """A scripted server."""
    server = ScriptedServer(f"ipc://{tmp_path}/scripted")
    yield server
    server.close()


@pytest.fixture
def unwatched_server(tmp_path: Path) -> Iterator[ScriptedServer]:
    """A scripted server in another pid namespace."""
    server = ScriptedServer(f"ipc://{tmp_path}/unwatched_server", watched=False)
    yield server
    server.close()


@pytest.fixture
def connect() -> Iterator[Callable[[ScriptedServer], KVClient]]:
    """Return a function that connects a client to a scripted server."""
    clients: list[KVClient] = []

    def start(server: ScriptedServer) -> KVClient:
        clients.append(KVClient(server.address, timeout_s=20))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def test_a_restarted_server_gets_handshake_registrations_and_request(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """After a stale boot token: hello, registrations, then the request again."""
    client = connect(scripted_server)
    client.register_kv_cache(RegisterKVCache("i", "e", "m", 1, 0, (), ()))
    scripted_server.seen.clear()
    scripted_server.boot = BootToken(2)
    client.end_session(KEY)
    assert scripted_server.names() == [
        "EndSession",
        "Hello",
        "RegisterKVCache",
        "EndSession",
    ]
    assert client.server.boot == 2


def test_a_removed_registration_is_not_restored(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """A restart restores the remaining registrations only."""
    client = connect(scripted_server)
    client.register_kv_cache(RegisterKVCache("i", "e", "m", 1, 0, (), ()))
    client._connection.reconnect.remove_registration("i")
    scripted_server.seen.clear()
    scripted_server.boot = BootToken(2)
    client.end_session(KEY)
    assert scripted_server.names() == ["EndSession", "Hello", "EndSession"]


def test_the_number_of_sends_is_limited(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """A server that rejects every send ends the request with its error."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = StaleBoot("never")
    with pytest.raises(StaleBoot, match="never"):
        client.end_session(KEY)
    assert scripted_server.names().count("EndSession") == 4


def test_a_rejected_handshake_raises_in_the_constructor(
    scripted_server: ScriptedServer,
) -> None:
    """The error is the one that the server replied."""
    scripted_server.answers[Hello] = BadRequest("wrong version")
    with pytest.raises(BadRequest, match="wrong version"):
        KVClient(scripted_server.address, timeout_s=20)


@pytest.mark.parametrize("frame", [b"", b"junk", encode_reply(10**6, Done())])
def test_an_unmatched_frame_is_dropped(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    frame: bytes,
) -> None:
    """The pending request fails at its deadline."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = frame
    with pytest.raises(DeadlineExceeded):
        client.call(EndSession(KEY), 0.05)
    client.ping()


def test_a_reply_of_the_wrong_shape_fails_its_request(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """The caller gets an error, not the wrong reply."""
    client = connect(scripted_server)
    scripted_server.answers[Ping] = Done()
    with pytest.raises(BadRequest, match="reply"):
        client.ping()


def test_closing_fails_pending_requests(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """They fail with `Closed`, the server gets a goodbye, and new requests fail."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = None
    future = client.submit_end_session(KEY)
    scripted_server.wait_for(EndSession)
    client.close()
    client.close()
    with pytest.raises(Closed):
        future.result(20)
    scripted_server.wait_for(Goodbye)
    with pytest.raises(Closed):
        client.ping()


def test_closing_fails_a_call_of_another_thread(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """`close` does not wait for a reply."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = None
    errors: list[BaseException] = []

    def send_requests() -> None:
        try:
            client.end_session(KEY)
        except KVError as error:
            errors.append(error)

    thread = threading.Thread(target=send_requests)
    thread.start()
    scripted_server.wait_for(EndSession)
    client.close()
    thread.join(20)
    assert [type(end) for end in errors] == [Closed]


def test_closing_during_calls_leaves_no_thread_waiting(
    scripted_server: ScriptedServer,
) -> None:
    """Both threads end in every interleaving."""
    for _ in range(50):
        client = KVClient(scripted_server.address, timeout_s=20)

        def send_requests(client: KVClient = client) -> None:
            with suppress(Closed):
                while True:
                    client.ping()

        thread = threading.Thread(target=send_requests)
        thread.start()
        client.end_session(KEY)
        client.close()
        thread.join(20)
        assert not thread.is_alive()


def test_heartbeats_continue_while_a_request_is_pending(
    unwatched_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """For a server that cannot watch the process, idle clients send them too."""
    client = connect(unwatched_server)
    unwatched_server.wait_for(Ping, 4)
    future = client.submit_retrieve(KEY, "i", 0, 64, [[0]])
    unwatched_server.wait_for(Retrieve)
    unwatched_server.seen.clear()
    unwatched_server.wait_for(Ping, 3)
    assert not future.done()


def test_a_restart_fails_requests_to_an_unwatched_server(
    unwatched_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """Losing the address counts as its end: even a retrieve fails."""
    client = connect(unwatched_server)
    future = client.submit_retrieve(KEY, "i", 0, 64, [[0]], timeout_s=0.01)
    unwatched_server.wait_for(Retrieve)
    unwatched_server.boot = BootToken(2)
    with pytest.raises(KVError, match="is gone"):
        future.result(20)


def test_threads_share_a_connection(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """Each call of each thread gets its own reply."""
    client = connect(scripted_server)
    failures: list[BaseException] = []

    def send_requests() -> None:
        try:
            for _ in range(50):
                client.ping()
                client.submit_end_session(KEY).result(20)
        except BaseException as error:  # noqa: BLE001 - asserted below
            failures.append(error)

    threads = [threading.Thread(target=send_requests) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_requests_failed_by_a_rejected_handshake_are_not_sent(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """A failed request is not sent after the next successful handshake."""
    client = connect(scripted_server)
    scripted_server.boot = BootToken(2)
    scripted_server.answers[Hello] = BadRequest("another version")
    with pytest.raises(BadRequest, match="another version"):
        client.submit(EndSession(KEY)).result(20)
    del scripted_server.answers[Hello]
    client.submit(Ping()).result(20)
    client.submit(Ping()).result(20)
    # Once, to the previous server, which rejected it.
    assert scripted_server.names().count("EndSession") == 1


def test_a_callback_may_close_the_client(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """On the background thread; the other pending requests fail."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = None
    scripted_server.answers[Ping] = None
    ended = client.submit_end_session(KEY)
    unanswered = client.submit(Ping())
    scripted_server.wait_for(Ping, 2)
    ended.add_done_callback(lambda _: client.close())
    scripted_server.answer(EndSession, Done())
    assert ended.result(20) == Done()
    with pytest.raises(Closed):
        unanswered.result(20)
    client.close()
    assert not client._connection._thread.is_alive()
    assert client._connection._socket.closed


def test_a_callback_may_close_in_another_threads_call(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """The call whose thread runs the callback fails too."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = None
    scripted_server.answers[Ping] = None
    errors: list[BaseException] = []

    def send_requests() -> None:
        try:
            client.end_session(KEY)
        except KVError as error:
            errors.append(error)

    thread = threading.Thread(target=send_requests, daemon=True)
    thread.start()
    scripted_server.wait_for(EndSession)
    future = client.submit(Ping())
    future.add_done_callback(lambda _: client.close())
    scripted_server.wait_for(Ping, 2)
    scripted_server.answer(Ping, Pong(0))
    future.result(20)
    thread.join(20)
    assert not thread.is_alive()
    client.close()
    assert [type(end) for end in errors] == [Closed]
    assert client._connection._socket.closed


@pytest.mark.parametrize("name", ["message", "self", "code"])
def test_error_details_may_have_any_name(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    name: str,
) -> None:
    """The request fails with the error; the connection stays usable."""
    client = connect(scripted_server)
    error = BadRequest("as scripted")
    error.details = {name: 1}
    scripted_server.answers[EndSession] = error
    with pytest.raises(BadRequest, match="as scripted") as raised:
        client.submit_end_session(KEY).result(20)
    assert raised.value.details == {name: 1}
    client.ping()


def test_an_invalid_process_id_is_not_watched(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """The handshake succeeds without a pidfd."""
    scripted_server.pid = 1 << 40
    client = connect(scripted_server)
    client.ping()
    assert client.server.pid == 1 << 40


def test_a_restart_during_restoration_registers_once_per_server(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """A registration sent to one server is not sent again to the next one."""
    client = connect(scripted_server)
    client.register_kv_cache(RegisterKVCache("i", "e", "m", 1, 0, (), ()))
    scripted_server.boots[RegisterKVCache] = BootToken(3)
    scripted_server.seen.clear()
    scripted_server.boot = BootToken(2)
    client.end_session(KEY)
    assert client.server.boot == 3
    assert scripted_server.names() == [
        *("EndSession", "Hello", "RegisterKVCache", "EndSession"),
        *("Hello", "RegisterKVCache", "EndSession"),
    ]


def test_a_replaced_server_is_watched_until_it_exits(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """Its process may still write, so pending requests fail only at its exit."""
    with Popen(["sleep", "1000"]) as process:
        scripted_server.pid = process.pid
        client = connect(scripted_server)
        future = client.submit_retrieve(KEY, "i", 0, 64, [[0]])
        scripted_server.wait_for(Retrieve)
        scripted_server.pid = os.getpid()
        scripted_server.boot = BootToken(2)
        client.ping()
        assert client.server.boot == 2
        assert not future.done()
        process.kill()
        with pytest.raises(Unavailable, match="is gone"):
            future.result(20)
        client.ping()


def test_deadlines_expire_while_stray_replies_arrive(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even if another frame is always ready."""
    client = connect(scripted_server)
    stray_reply = encode_reply(10**6, Done())
    scripted_server.answers[EndSession] = stray_reply
    with monkeypatch.context() as patched:
        patched.setattr(client._connection._socket, "recv", lambda _: stray_reply)
        future = client.submit(EndSession(KEY), 0.05)
        with pytest.raises(DeadlineExceeded):
            future.result(20)
