"""A connection against a played server: what real ones do seldom or never."""

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
    """A server that runs on a thread and answers as it is told.

    `answers` maps a request's class to what is answered: a reply, an error, bytes as
    they are, or None for nothing.
    """

    def __init__(self, address: str, *, watched: bool = True) -> None:
        self.address = address
        self.watched = watched
        self.namespace = pid_namespace() if watched else 0
        self.heartbeat_s = 0.02
        self.pid = os.getpid()
        self.boot = BootToken(1)
        self.boots: dict[type[Request[Any]], BootToken] = {}
        """The run that begins just before the first request of a kind is read."""
        self.seen: list[Request[Any]] = []
        self.news = threading.Condition()
        self.answers: dict[type[Request[Any]], Any] = {
            Ping: Pong(0),
            EndSession: Done(),
            RegisterKVCache: RegisterReply((), 0),
        }
        self.is_deaf = threading.Event()
        self._later: deque[list[bytes]] = deque()
        self._unanswered: dict[type[Request[Any]], tuple[bytes, int]] = {}
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._stop = threading.Event()
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            while self._later:
                self._socket.send_multipart(self._later.popleft())
            if self.is_deaf.is_set():
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
                answer = StaleBoot("of another run")
            else:
                answer = self.answers.get(type(request))
            with self.news:
                self.seen.append(request)
                self.news.notify_all()
            if answer is None:
                self._unanswered[type(request)] = (identity, envelope.id)
                continue
            if isinstance(answer, KVError):
                answer = encode_error(envelope.id, answer)
            elif not isinstance(answer, bytes):
                answer = encode_reply(envelope.id, answer)
            self._socket.send_multipart([identity, answer])

    def answer(self, kind: type[Request[Any]], reply: Any) -> None:
        """Answer, now, the last request of a kind that was not."""
        identity, number = self._unanswered[kind]
        self._later.append([identity, encode_reply(number, reply)])

    def hello(self) -> HelloReply:
        """What it says of itself."""
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
        """Wait until so many requests of a kind came."""
        with self.news:
            is_so = self.news.wait_for(
                lambda: sum(isinstance(s, kind) for s in self.seen) >= count, 20
            )
        assert is_so, self.names()

    def names(self) -> list[str]:
        """What came, in order."""
        return [type(request).__name__ for request in self.seen]

    def close(self) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()
        self._socket.close()


@pytest.fixture
def scripted_server(tmp_path: Path) -> Iterator[ScriptedServer]:
    """A played server."""
    server = ScriptedServer(f"ipc://{tmp_path}/played")
    yield server
    server.close()


@pytest.fixture
def unwatched(tmp_path: Path) -> Iterator[ScriptedServer]:
    """A played server of another pid namespace."""
    server = ScriptedServer(f"ipc://{tmp_path}/unwatched", watched=False)
    yield server
    server.close()


@pytest.fixture
def connect() -> Iterator[Callable[[ScriptedServer], KVClient]]:
    """Connect to a played server."""
    clients: list[KVClient] = []

    def start(server: ScriptedServer) -> KVClient:
        clients.append(KVClient(server.address, timeout_s=20))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def test_another_run_is_met_in_order(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """Refused as stale: hello, the registrations, and then the request once more."""
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


def test_what_was_unregistered_is_not_registered_again(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """Only what should be there is restored."""
    client = connect(scripted_server)
    client.register_kv_cache(RegisterKVCache("i", "e", "m", 1, 0, (), ()))
    client._connection.runs.forget("i")
    scripted_server.seen.clear()
    scripted_server.boot = BootToken(2)
    client.end_session(KEY)
    assert scripted_server.names() == ["EndSession", "Hello", "EndSession"]


def test_a_server_that_is_never_content_is_given_up(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """A request is sent a few times, not for ever."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = StaleBoot("never")
    with pytest.raises(StaleBoot, match="never"):
        client.end_session(KEY)
    assert scripted_server.names().count("EndSession") == 4


def test_a_hello_that_is_refused_is_told(scripted_server: ScriptedServer) -> None:
    """Where versions differ there is no client."""
    scripted_server.answers[Hello] = BadRequest("speak otherwise")
    with pytest.raises(BadRequest, match="speak otherwise"):
        KVClient(scripted_server.address, timeout_s=20)


@pytest.mark.parametrize("frame", [b"", b"junk", encode_reply(10**6, Done())])
def test_a_frame_that_answers_nothing_is_dropped(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    frame: bytes,
) -> None:
    """The request that it might have answered ends at its deadline."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = frame
    with pytest.raises(DeadlineExceeded):
        client.call(EndSession(KEY), 0.05)
    client.ping()


def test_a_reply_of_the_wrong_shape_fails_its_request(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """It is not passed on as if it were right."""
    client = connect(scripted_server)
    scripted_server.answers[Ping] = Done()
    with pytest.raises(BadRequest, match="reply"):
        client.ping()


def test_closing_ends_what_is_unanswered(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """With `Closed`, and with a goodbye to the server; nothing can be asked then."""
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


def test_closing_ends_a_call_of_another_thread(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """Who closes does not wait for what may never be answered."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = None
    ends: list[BaseException] = []

    def ask() -> None:
        try:
            client.end_session(KEY)
        except KVError as error:
            ends.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    scripted_server.wait_for(EndSession)
    client.close()
    thread.join(20)
    assert [type(end) for end in ends] == [Closed]


def test_closing_amid_calls_leaves_nobody_waiting(
    scripted_server: ScriptedServer,
) -> None:
    """However the two meet, both end."""
    for _ in range(50):
        client = KVClient(scripted_server.address, timeout_s=20)

        def ask(client: KVClient = client) -> None:
            with suppress(Closed):
                while True:
                    client.ping()

        thread = threading.Thread(target=ask)
        thread.start()
        client.end_session(KEY)
        client.close()
        thread.join(20)
        assert not thread.is_alive()


def test_life_is_shown_while_waiting(
    unwatched: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """To a server that cannot watch the process: idle, or with a request under way."""
    client = connect(unwatched)
    unwatched.wait_for(Ping, 4)
    future = client.submit_retrieve(KEY, "i", 0, 64, [[0]])
    unwatched.wait_for(Retrieve)
    unwatched.seen.clear()
    unwatched.wait_for(Ping, 3)
    assert not future.done()


def test_a_new_run_ends_what_an_unwatched_one_was_asked(
    unwatched: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """Its address is another's now, so it writes no more: even a retrieve ends."""
    client = connect(unwatched)
    future = client.submit_retrieve(KEY, "i", 0, 64, [[0]], timeout_s=0.01)
    unwatched.wait_for(Retrieve)
    unwatched.boot = BootToken(2)
    with pytest.raises(KVError, match="is gone"):
        future.result(20)


def test_any_thread_may_ask(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """Calls from many threads all get their own answers."""
    client = connect(scripted_server)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(50):
                client.ping()
                client.submit_end_session(KEY).result(20)
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_what_a_refused_hello_ended_is_never_sent(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """A request that has failed does not come back with the next good hello."""
    client = connect(scripted_server)
    scripted_server.boot = BootToken(2)
    scripted_server.answers[Hello] = BadRequest("another version")
    with pytest.raises(BadRequest, match="another version"):
        client.submit(EndSession(KEY)).result(20)
    del scripted_server.answers[Hello]
    client.submit(Ping()).result(20)
    client.submit(Ping()).result(20)
    # Once to the earlier run, which refused it; not again.
    assert scripted_server.names().count("EndSession") == 1


def test_a_callback_may_close(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """On the connection's own thread; what else is unanswered ends."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = None
    scripted_server.answers[Ping] = None
    ended = client.submit_end_session(KEY)
    left = client.submit(Ping())
    scripted_server.wait_for(Ping, 2)
    ended.add_done_callback(lambda _: client.close())
    scripted_server.answer(EndSession, Done())
    assert ended.result(20) == Done()
    with pytest.raises(Closed):
        left.result(20)
    client.close()
    assert not client._connection._thread.is_alive()
    assert client._connection._socket.closed


def test_a_callback_may_close_in_another_threads_call(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """The call that served it ends too."""
    client = connect(scripted_server)
    scripted_server.answers[EndSession] = None
    scripted_server.answers[Ping] = None
    ends: list[BaseException] = []

    def ask() -> None:
        try:
            client.end_session(KEY)
        except KVError as error:
            ends.append(error)

    thread = threading.Thread(target=ask, daemon=True)
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
    assert [type(end) for end in ends] == [Closed]
    assert client._connection._socket.closed


@pytest.mark.parametrize("name", ["message", "self", "code"])
def test_an_error_may_have_details_of_any_name(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    name: str,
) -> None:
    """The request that it answers fails with it; the connection goes on."""
    client = connect(scripted_server)
    error = BadRequest("so it is")
    error.details = {name: 1}
    scripted_server.answers[EndSession] = error
    with pytest.raises(BadRequest, match="so it is") as raised:
        client.submit_end_session(KEY).result(20)
    assert raised.value.details == {name: 1}
    client.ping()


def test_a_server_of_an_impossible_process_is_not_watched(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """It is met all the same."""
    scripted_server.pid = 1 << 40
    client = connect(scripted_server)
    client.ping()
    assert client.server.pid == 1 << 40


def test_a_run_that_was_never_registered_with_is_no_reason_to_register_twice(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """What was on its way to one run is not sent to the next one besides."""
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


def test_a_run_that_outlives_its_address_is_watched(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """It may write what it was asked to until its process ends; then that ends."""
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


def test_deadlines_pass_while_nonsense_keeps_coming(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However fast it comes: there is always another frame."""
    client = connect(scripted_server)
    nonsense = encode_reply(10**6, Done())
    scripted_server.answers[EndSession] = nonsense
    with monkeypatch.context() as patched:
        patched.setattr(client._connection._socket, "recv", lambda _: nonsense)
        future = client.submit(EndSession(KEY), 0.05)
        with pytest.raises(DeadlineExceeded):
            future.result(20)
