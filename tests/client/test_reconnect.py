"""How the runs of a server are met, against a played one."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from kvcore.client import KVClient
from kvcore.client import reconnect as runs
from kvcore.client.pending_requests import PendingRequest
from kvcore.errors import BadRequest, StaleBoot, Unavailable
from kvcore.protocol import (
    BootToken,
    EndSession,
    Goodbye,
    Hello,
    RegisterKVCache,
    RegisterReply,
)
from tests.client.test_connection import (
    KEY,
    ScriptedServer,
    connect,
    scripted_server,
    unwatched,
)

__all__ = ["connect", "scripted_server", "unwatched"]


def test_a_run_that_calls_all_registrations_stale_is_greeted_ever_more_seldom(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second hello comes at once, since a run may end just then; a third waits."""
    monkeypatch.setattr(runs, "HELLO_AGAIN_NS", 3600 * 10**9)
    client = connect(scripted_server)
    client.register_kv_cache(RegisterKVCache("i", "e", "m", 1, 0, (), ()))
    scripted_server.answers[RegisterKVCache] = StaleBoot("never")
    scripted_server.seen.clear()
    scripted_server.boot = BootToken(2)
    client.end_session(KEY)
    scripted_server.wait_for(RegisterKVCache, 2)

    def ask() -> None:
        while True:  # Until the last refusal is taken in.
            client.call(EndSession(KEY), 0.1)

    with pytest.raises(Unavailable, match="no server answers"):
        ask()
    assert scripted_server.names().count("Hello") == 2
    assert scripted_server.names().count("RegisterKVCache") == 2


def test_a_greeting_that_was_put_off_is_made_in_time(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the connection's thread, also when nobody asks for anything."""
    monkeypatch.setattr(runs, "HELLO_AGAIN_NS", 20_000_000)
    client = connect(scripted_server)
    client.register_kv_cache(RegisterKVCache("i", "e", "m", 1, 0, (), ()))
    scripted_server.answers[RegisterKVCache] = StaleBoot("never")
    scripted_server.seen.clear()
    scripted_server.boot = BootToken(2)
    client.submit_end_session(KEY)
    scripted_server.wait_for(Hello, 4)
    scripted_server.answers[RegisterKVCache] = RegisterReply((), 0)
    client.ping()


@pytest.mark.parametrize("heartbeat_s", [0.0, -1.0, 1e-300, math.nan, math.inf, 1e30])
def test_a_heartbeat_that_cannot_be_is_refused(
    unwatched: ScriptedServer, heartbeat_s: float
) -> None:
    """The server is not met, rather than shown life without pause, or never."""
    unwatched.heartbeat_s = heartbeat_s
    with pytest.raises(BadRequest, match="heartbeat_s"):
        KVClient(unwatched.address, timeout_s=20)
    assert "Ping" not in unwatched.names()


def test_what_is_registered_is_known_to_be_so_at_once(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """A run that is met before the caller goes on is told of it too."""
    client = connect(scripted_server)
    scripted_server.answers[RegisterKVCache] = None
    request = RegisterKVCache("i", "e", "m", 1, 0, (), ())
    replies: list[RegisterReply] = []

    def register() -> None:
        replies.append(client.register_kv_cache(request))

    held = threading.Event()
    taken = PendingRequest.succeed

    def slowly(pending: PendingRequest, reply: Any) -> None:
        taken(pending, reply)
        if isinstance(pending.request, RegisterKVCache) and not pending.is_restoring:
            # Another run is met by who holds the socket, before the caller wakes.
            scripted_server.boot = BootToken(2)
            client._connection.runs.refused(BootToken(1))
            client._connection._transmit(PendingRequest(EndSession(KEY), 0))
            held.set()

    with mock.patch.object(PendingRequest, "succeed", slowly):
        thread = threading.Thread(target=register)
        thread.start()
        scripted_server.wait_for(RegisterKVCache)
        scripted_server.answers[RegisterKVCache] = RegisterReply((), 0)
        scripted_server.answer(RegisterKVCache, RegisterReply((), 0))
        thread.join(20)
    assert held.is_set()
    scripted_server.wait_for(RegisterKVCache, 2)


def test_who_leaves_before_it_was_greeted_says_goodbye(
    scripted_server: ScriptedServer,
) -> None:
    """The server may read the hello yet, and would wait for its process to end."""
    scripted_server.answers[Hello] = None
    with pytest.raises(Unavailable):
        KVClient(scripted_server.address, timeout_s=0.05)
    scripted_server.wait_for(Goodbye)
    assert scripted_server.names() == ["Hello", "Goodbye"]
