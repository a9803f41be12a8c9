"""The interface of a system under test.

A driver of another system is an `ExternalClient`, listed in `system_registry`. This
project's is `kvcore.client.KVClient`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from kvcore.client import KVClient
from kvcore.client.client import BlockLists
from kvcore.config import ServerConfig
from kvcore.errors import ChunksMissing
from kvcore.keys import SessionKey, Tokens
from kvcore.protocol import (
    BootToken,
    LookupReply,
    PosixShm,
    RegisterKVCache,
    RegisterReply,
    RetrieveReply,
    StatusReply,
    StoreReply,
)
from kvcore.status import L1Status
from kvctl.lab.config.model_geometry import Indices
from kvctl.lab.config.scenario import SystemSpec


@dataclass(frozen=True, slots=True)
class StartedSystem:
    """Command and address of another system's server."""

    command: tuple[str, ...]
    address: str
    """`unix://PATH` or `tcp://HOST:PORT`; accepts connections when ready."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """The chunks of tokens [start, end) of a session, and their blocks."""

    session: SessionKey
    start: int
    end: int
    blocks: Indices
    """Of the one cache group, `[chunks x blocks per chunk]`."""
    tokens: Tokens
    """Of the session from its first one."""


class ExternalClient(ABC):
    """A client of another system, used by a scheduler (several threads) or one rank.

    Ranges are whole chunks. A driver MUST copy the bytes of the blocks: the lab checks
    each of them.
    """

    chunk_size: int
    server: None = None
    has_sessions = True
    """False if `end_session` sends nothing, and is not worth timing."""

    @abstractmethod
    def __init__(
        self, spec: SystemSpec, address: str, config: ServerConfig, timeout_s: float
    ) -> None:
        """Connect to a server."""

    @staticmethod
    @abstractmethod
    def start(spec: SystemSpec, config: ServerConfig, folder: Path) -> StartedSystem:
        """Return how the server is started; its files go into the folder.

        Raises:
            SetupError: the system is not installed.
        """

    @property
    def last_call_s(self) -> float | None:
        """Duration of this thread's last call as an engine would see it.

        None if it is the duration that the caller measured.
        """
        return None

    @abstractmethod
    def register_kv_cache(self, request: RegisterKVCache) -> RegisterReply:
        """Register a rank's cache; once, before any store or retrieve."""

    @abstractmethod
    def lookup(
        self, session: SessionKey, model: str, world_size: int, tokens: Tokens
    ) -> LookupReply:
        """Return the leading chunks that every rank can retrieve."""

    def store(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
    ) -> StoreReply:
        """Store the blocks of tokens [start, end); retrievable after the call."""
        del instance_id
        num_chunks = (end - start) // self.chunk_size
        if self.store_chunks(_chunk_range(session, start, end, blocks, tokens)):
            return StoreReply(num_chunks, 0, 0)
        return StoreReply(0, 0, num_chunks)

    @abstractmethod
    def store_chunks(self, chunks: ChunkRange) -> bool:
        """Store; return whether all chunks can be retrieved now."""

    def retrieve(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
    ) -> RetrieveReply:
        """Fill the blocks of tokens [start, end).

        Raises:
            ChunksMissing: chunks have been evicted since the lookup.
        """
        del instance_id
        if not self.retrieve_chunks(_chunk_range(session, start, end, blocks, tokens)):
            raise ChunksMissing("the retrieve failed: chunks were evicted")
        return RetrieveReply(end - start)

    @abstractmethod
    def retrieve_chunks(self, chunks: ChunkRange) -> bool:
        """Fill the blocks; return whether all chunks were there."""

    @abstractmethod
    def end_session(self, session: SessionKey) -> None:
        """End a request."""

    @abstractmethod
    def ping(self) -> None:
        """Make one round trip."""

    @abstractmethod
    def close(self) -> None:
        """Release connections and memory."""

    @abstractmethod
    def unregister_kv_cache(self, instance_id: str) -> None:
        """Unregister a rank's cache."""

    def status(self, max_leases: int = 0) -> StatusReply:
        """Return an empty status: the internals of another system are unknown."""
        del max_leases
        return StatusReply(
            version="", address="", pid=0, boot=BootToken(0),
            chunk_size=self.chunk_size, uptime_s=0, num_clients=0, num_sessions=0,
            l1=L1Status(0, 0, 0, 0, 0, 0, 0), instances=(), leases=(), num_leases=0,
            counters={},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


Client = KVClient | ExternalClient


def _chunk_range(
    session: SessionKey,
    start: int,
    end: int,
    blocks: BlockLists,
    tokens: Tokens | None,
) -> ChunkRange:
    ids = np.asarray(blocks[0], np.int32)
    prompt = np.empty(0, np.uint32) if tokens is None else tokens
    return ChunkRange(session, start, end, ids, prompt)


def shared_memory_handles(request: RegisterKVCache) -> list[PosixShm]:
    """Return the handles of a cache in host memory."""
    return [one for one in request.handles if isinstance(one, PosixShm)]


def call_duration_s(client: Client, measured_s: float) -> float:
    """Return the duration of a client's last call, which took its caller `measured_s`.

    A driver whose client runs in another process measures without the pipe to it.
    """
    if isinstance(client, ExternalClient) and client.last_call_s is not None:
        return client.last_call_s
    return measured_s
