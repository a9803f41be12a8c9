"""Handshake, re-registration and heartbeats, against a scripted server."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from kvcore.client import KVClient, reconnect
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
    unwatched_server,
)

__all__ = ["connect", "scripted_server", "unwatched_server"]


def test_handshakes_back_off_while_registrations_are_rejected(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second hello is sent at once; the third waits for the back-off."""
    monkeypatch.setattr(reconnect, "HELLO_RETRY_NS", 3600 * 10**9)
    client = connect(scripted_server)
    client.register_kv_cache(RegisterKVCache("i", "e", "m", 1, 0, (), ()))
    scripted_server.answers[RegisterKVCache] = StaleBoot("never")
    scripted_server.seen.clear()
    scripted_server.boot = BootToken(2)
    client.end_session(KEY)
    scripted_server.wait_for(RegisterKVCache, 2)

    def end_session_until_refused() -> None:
        while True:  # Until the client has read the last rejection.
            client.call(EndSession(KEY), 0.1)

    with pytest.raises(Unavailable, match="no server answers"):
        end_session_until_refused()
    assert scripted_server.names().count("Hello") == 2
    assert scripted_server.names().count("RegisterKVCache") == 2


def test_a_delayed_handshake_is_sent_by_the_background_thread(
    scripted_server: ScriptedServer,
    connect: Callable[[ScriptedServer], KVClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It needs no further request of the caller."""
    monkeypatch.setattr(reconnect, "HELLO_RETRY_NS", 20_000_000)
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
def test_an_invalid_heartbeat_interval_fails_the_handshake(
    unwatched_server: ScriptedServer, heartbeat_s: float
) -> None:
    """The client sends no heartbeat to such a server."""
    unwatched_server.heartbeat_s = heartbeat_s
    with pytest.raises(BadRequest, match="heartbeat_s"):
        KVClient(unwatched_server.address, timeout_s=20)
    assert "Ping" not in unwatched_server.names()


def test_a_registration_is_saved_before_the_caller_resumes(
    scripted_server: ScriptedServer, connect: Callable[[ScriptedServer], KVClient]
) -> None:
    """A server that restarts before the caller resumes gets the registration too."""
    client = connect(scripted_server)
    scripted_server.answers[RegisterKVCache] = None
    request = RegisterKVCache("i", "e", "m", 1, 0, (), ())
    replies: list[RegisterReply] = []

    def register() -> None:
        replies.append(client.register_kv_cache(request))

    restarted = threading.Event()
    succeed = PendingRequest.succeed

    def succeed_and_restart(pending: PendingRequest, reply: Any) -> None:
        succeed(pending, reply)
        if isinstance(pending.request, RegisterKVCache) and not pending.is_restoring:
            # The thread that holds the socket reconnects before the caller wakes.
            scripted_server.boot = BootToken(2)
            client._connection.reconnect.mark_stale(BootToken(1))
            client._connection._transmit(PendingRequest(EndSession(KEY), 0))
            restarted.set()

    with mock.patch.object(PendingRequest, "succeed", succeed_and_restart):
        thread = threading.Thread(target=register)
        thread.start()
        scripted_server.wait_for(RegisterKVCache)
        scripted_server.answers[RegisterKVCache] = RegisterReply((), 0)
        scripted_server.answer(RegisterKVCache, RegisterReply((), 0))
        thread.join(20)
    assert restarted.is_set()
    scripted_server.wait_for(RegisterKVCache, 2)


def test_closing_during_the_handshake_sends_a_goodbye(
    scripted_server: ScriptedServer,
) -> None:
    """The server may still read the hello, and would keep the client until it exits."""
    scripted_server.answers[Hello] = None
    with pytest.raises(Unavailable):
        KVClient(scripted_server.address, timeout_s=0.05)
    scripted_server.wait_for(Goodbye)
    assert scripted_server.names() == ["Hello", "Goodbye"]
