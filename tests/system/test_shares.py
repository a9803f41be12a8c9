"""One engine pins at most its share of L1; others still store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from kvcore.client import KVClient
from kvcore.client.client import prepare_retrieve, prepare_store
from kvcore.errors import Overloaded
from kvcore.keys import SessionKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import (
    Hold,
    PosixShm,
    Private,
    RegisterKVCache,
    Reserve,
    Retrieve,
    Store,
)
from kvcore.shm import Segment
from tests.system.server_fixture import Server

NAME = f"kvtest-{os.getpid()}-shares"
NUM_BLOCKS = 256
TOKENS = 16 * NUM_BLOCKS
"""Tokens per prompt: 64 chunks of 32 KiB, a quarter of L1."""
SIZE = NUM_BLOCKS * 16 * 512
GROUP = CacheGroup(
    "NSD", "uint8", 16, (TensorView(0, 0, (NUM_BLOCKS, 16, 512), (8192, 512, 1)),)
)
BLOCKS = [list(range(NUM_BLOCKS))]


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    """A server with 8 MiB of L1 and the default share."""
    return serve("--set", "l1.engine_share=0.5")


@pytest.fixture
def greedy(server: Server) -> Iterator[KVClient]:
    """An engine that keeps what it can get."""
    with (
        Segment.create(f"{NAME}-g", SIZE, touch=True),
        KVClient(server.address, engine_key=b"greedy") as client,
    ):
        register(client, "g", PosixShm(f"{NAME}-g", 0, SIZE))
        register(client, "p", Private(SIZE))
        yield client


@pytest.fixture
def other(server: Server) -> Iterator[KVClient]:
    """Another engine."""
    with (
        Segment.create(f"{NAME}-o", SIZE, touch=True),
        KVClient(server.address, engine_key=b"other") as client,
    ):
        register(client, "o", PosixShm(f"{NAME}-o", 0, SIZE))
        yield client


def register(client: KVClient, name: str, handle: PosixShm | Private) -> None:
    """Register a cache of one rank."""
    client.register_kv_cache(
        RegisterKVCache(name, name, "m", 1, 0, (handle,), (GROUP,))
    )


def prompt(number: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the tokens of one of many prompts without a common chunk."""
    return np.arange(number * 10**6, number * 10**6 + TOKENS, dtype=np.uint32)


def reserve(number: int) -> Reserve:
    """Return the reservation of a prompt."""
    key = SessionKey("p", str(number))
    store = prepare_store(key, "p", 0, TOKENS, BLOCKS).request
    assert isinstance(store, Store)
    return Reserve(replace(store, tokens=memoryview(prompt(number).tobytes())))


def hold(number: int) -> Hold:
    """Return the hold on a prompt."""
    key = SessionKey("p", str(number))
    retrieve = prepare_retrieve(key, "p", 0, TOKENS, BLOCKS).request
    assert isinstance(retrieve, Retrieve)
    return Hold(replace(retrieve, tokens=memoryview(prompt(number).tobytes())))


def stores(client: KVClient) -> int:
    """Store a prompt of its own; return the number of stored chunks."""
    return client.store(
        SessionKey("o", "store"), "o", 0, TOKENS, BLOCKS, prompt(99)
    ).num_stored


def test_leases_leave_room_for_others(greedy: KVClient, other: KVClient) -> None:
    """Lookups of more than the share find fewer chunks."""
    found = []
    for number in range(4):
        session = SessionKey("g", str(number))
        greedy.store(session, "g", 0, TOKENS, BLOCKS, prompt(number))
        found.append(greedy.lookup(session, "m", 1, prompt(number)).num_chunks)
    assert sum(found) == 128
    assert stores(other) == 64
    assert other.status().counters["pins_limited"] > 0


def test_tickets_leave_room_for_others(greedy: KVClient, other: KVClient) -> None:
    """Reservations and holds beyond the share are refused."""
    for number in range(2):
        assert greedy.call(reserve(number)).ticket is not None
    with pytest.raises(Overloaded, match=r"l1\.engine_share"):
        greedy.call(reserve(2))
    assert stores(other) == 64


def test_holds_leave_room_for_others(greedy: KVClient, other: KVClient) -> None:
    """Holds count like leases."""
    for number in range(3):
        session = SessionKey("g", str(number))
        greedy.store(session, "g", 0, TOKENS, BLOCKS, prompt(number))
    for number in range(2):
        assert greedy.call(hold(number)).ticket is not None
    with pytest.raises(Overloaded):
        greedy.call(hold(2))
    assert stores(other) == 64
