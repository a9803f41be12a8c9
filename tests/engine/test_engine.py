"""Engine handlers: events between the slices of a request."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Any

import pytest

from kvcore.config import ServerConfig, WireConfig
from kvcore.copy.host_cache import HostCache
from kvcore.engine.engine import Engine
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.errors import BadRequest, UnknownInstance
from kvcore.extents import Checksum
from kvcore.keys import SessionKey, pack_tokens
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import (
    EndSession,
    Lookup,
    LookupReply,
    PosixShm,
    RegisterKVCache,
    Retrieve,
    Store,
    UnregisterKVCache,
)
from kvcore.shm import Segment
from kvcore.storage.arena import Arena

CHUNK = 16
KEY = SessionKey("e", "r")
ME = RequestContext(b"me", os.getpid())
GROUP = CacheGroup("NSD", "uint8", 16, (TensorView(0, 0, (4, 16, 8), (128, 8, 1)),))
TOKENS = memoryview(pack_tokens(range(4 * CHUNK)))
BLOCKS = (memoryview(pack_tokens(range(4))),)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine with instance "i" of model "m", hashing one chunk per slice."""
    name = f"kvtest-{os.getpid()}-engine"
    config = ServerConfig(chunk_size=CHUNK, wire=WireConfig(slice_chunks=1))
    arena = Arena(1 << 16, 4096, f"{name}-arena")
    engine = Engine(config, arena)
    with Segment.create(name, 512, touch=True):
        handles = (PosixShm(name, 0, 512),)
        engine.register_kv_cache(
            RegisterKVCache("i", "e", "m", 1, 0, handles, (GROUP,)), ME
        )
        yield engine
        engine.close()
        arena.close()


@pytest.mark.parametrize("kind", [Store, Retrieve])
def test_an_instance_may_go_while_its_tokens_are_hashed(
    engine: Engine, kind: type[Store] | type[Retrieve]
) -> None:
    """The request fails, and its use of the session ends."""
    request = kind(KEY, "i", 0, 4 * CHUNK, BLOCKS, tokens=TOKENS)
    steps = (engine.store if kind is Store else engine.retrieve)(request, ME)
    next(steps)
    engine.unregister_kv_cache(UnregisterKVCache("i"), ME)
    with pytest.raises(UnknownInstance):
        list(steps)
    engine.end_session(EndSession(KEY), ME)
    assert len(engine.sessions) == 0


@pytest.mark.parametrize("kind", [Store, Retrieve])
def test_a_range_that_ends_before_it_begins_is_refused(
    engine: Engine, kind: type[Store] | type[Retrieve]
) -> None:
    """It is no empty one, which has nothing to copy: whoever asked is mistaken."""
    request = kind(KEY, "i", 2 * CHUNK, CHUNK, BLOCKS, tokens=TOKENS)
    steps = (engine.store if kind is Store else engine.retrieve)(request, ME)
    with pytest.raises(BadRequest, match="range 32 to 16"):
        next(steps)


def test_a_lookup_that_is_dropped_holds_nothing(engine: Engine) -> None:
    """Its client ends between two slices."""
    steps = engine.lookup(Lookup(KEY, "m", 1, 4 * CHUNK, TOKENS), ME)
    next(steps)
    steps.close()
    engine.end_session(EndSession(KEY), ME)
    assert len(engine.sessions) == 0
    assert engine.l1.stats().num_held == 0


def test_a_session_that_ends_in_a_lookup_gets_no_lease(engine: Engine) -> None:
    """The session ends before the reply: the chunks found are released."""
    settle(engine.store(Store(KEY, "i", 0, 4 * CHUNK, BLOCKS, tokens=TOKENS), ME))
    engine.end_session(EndSession(KEY), ME)
    steps = engine.lookup(Lookup(KEY, "m", 1, 4 * CHUNK, TOKENS), ME)
    next(steps)
    engine.end_session(EndSession(KEY), ME)
    list(steps)
    assert len(engine.leases) == 0
    assert len(engine.sessions) == 0
    assert engine.l1.stats().num_held == 0


def test_a_lookup_that_is_overtaken_finds_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later lookup of the session was answered first; its lease stays."""
    settle(engine.store(Store(KEY, "i", 0, 4 * CHUNK, BLOCKS, tokens=TOKENS), ME))
    monkeypatch.setattr("kvcore.engine.lookups.ACQUIRE_CHUNKS", 1)
    older = engine.lookup(Lookup(KEY, "m", 1, 4 * CHUNK, TOKENS), ME)
    while not engine.l1.stats().num_held:
        next(older)
    half = TOKENS[: 4 * 2 * CHUNK]
    newer = engine.lookup(Lookup(KEY, "m", 1, 2 * CHUNK, half), ME)
    assert settle(newer) == LookupReply(2, 2 * CHUNK)
    assert settle(older) == LookupReply(0, 0)
    assert engine.l1.stats().num_held == 2
    engine.end_session(EndSession(KEY), ME)
    assert engine.l1.stats().num_held == 0


def test_a_store_whose_client_dies_is_not_kept(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reservations are aborted, although the copy completed."""
    gather = HostCache.gather

    def gather_and_die(cache: HostCache, *args: Any, **named: Any) -> list[Checksum]:
        made = gather(cache, *args, **named)
        engine.end_client(ME.client)
        return made

    monkeypatch.setattr(HostCache, "gather", gather_and_die)
    with pytest.raises(UnknownInstance):
        settle(engine.store(Store(KEY, "i", 0, 4 * CHUNK, BLOCKS, tokens=TOKENS), ME))
    stats = engine.l1.stats()
    assert (stats.num_parts, stats.num_reserved, stats.used_bytes) == (0, 0, 0)


def settle(steps: Iterator[None]) -> object:
    """Run a request to its end and return the reply."""
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        running = stop.value
    if not isinstance(running, DeferredReply):
        return running
    wait([running.future], 20)
    return running.finish()


def test_a_lookup_of_an_ended_session_leaves_the_next_ones_lease(
    engine: Engine,
) -> None:
    """The id names another session before the first one's lookup has ended."""
    settle(engine.store(Store(KEY, "i", 0, 4 * CHUNK, BLOCKS, tokens=TOKENS), ME))
    engine.end_session(EndSession(KEY), ME)
    steps = engine.lookup(Lookup(KEY, "m", 1, 4 * CHUNK, TOKENS), ME)
    next(steps)
    engine.end_session(EndSession(KEY), ME)
    list(engine.lookup(Lookup(KEY, "m", 1, 2 * CHUNK, TOKENS[: 8 * CHUNK]), ME))
    assert len(engine.leases) == 1
    list(steps)
    assert len(engine.leases) == 1
    assert engine.l1.stats().num_held == 2


@pytest.mark.parametrize("ends", [True, False])
def test_a_read_counts_for_the_lease_that_it_was_asked_under(
    engine: Engine, ends: bool
) -> None:
    """It does not count for the lease of a later lookup."""
    settle(engine.store(Store(KEY, "i", 0, 4 * CHUNK, BLOCKS, tokens=TOKENS), ME))
    lookup = Lookup(KEY, "m", 1, 4 * CHUNK, TOKENS)
    list(engine.lookup(lookup, ME))
    retrieve = Retrieve(KEY, "i", 0, 4 * CHUNK, BLOCKS)
    with pytest.raises(StopIteration) as stop:
        next(engine.retrieve(retrieve, ME))
    running = stop.value.value
    wait([running.future], 20)
    if ends:
        engine.end_session(EndSession(KEY), ME)
    list(engine.lookup(lookup, ME))
    running.finish()
    assert (len(engine.leases), engine.l1.stats().num_held) == (1, 4)
    settle(engine.retrieve(retrieve, ME))
    assert (len(engine.leases), engine.l1.stats().num_held) == (0, 0)
