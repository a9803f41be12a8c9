"""What the lab asks of a system under load.

A driver of another system is an `ExternalClient` and a way to start its server, both
entered in `system_registry`. Ours is `kvcore.client.KVClient` as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from kvcore.client import KVClient
from kvcore.client.client import BlockLists
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

OURS = "kvctl"


class SystemSpec(msgspec.Struct, frozen=True):
    """Which system, and where it lives."""

    name: str = OURS
    python: Annotated[
        str | None, Meta(description="the Python that another system is installed in")
    ] = None
    version: str = ""

    @property
    def is_ours(self) -> bool:
        """It is the one that this project is about."""
        return self.name == OURS


class ExternalClient(ABC):
    """A client of another system, used by a scheduler (several threads) or one rank.

    `tokens` are those of the session from its first one; ranges are whole chunks. A
    driver MUST move the bytes of the blocks themselves: the lab checks every one.
    """

    chunk_size: int
    server: None = None
    knows_sessions = True
    """Without it the end of one asks nobody anything, and is no call to be timed."""

    @property
    def last_s(self) -> float | None:
        """How long this thread's last call took where an engine would have made it.

        None: as long as the caller saw.
        """
        return None

    @abstractmethod
    def register_kv_cache(self, request: RegisterKVCache) -> RegisterReply:
        """Let the system at a rank's cache; once, before any store or retrieve."""

    @abstractmethod
    def lookup(
        self, session: SessionKey, model: str, world_size: int, tokens: Tokens
    ) -> LookupReply:
        """Count the leading chunks that every rank can retrieve."""

    @abstractmethod
    def store(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
    ) -> StoreReply:
        """Store the blocks of [start, end); retrievable when this returns."""

    @abstractmethod
    def retrieve(
        self,
        session: SessionKey,
        instance_id: str,
        start: int,
        end: int,
        blocks: BlockLists,
        tokens: Tokens | None = None,
    ) -> RetrieveReply:
        """Fill the blocks of [start, end).

        Raises:
            ChunksMissing: not all of it is there any more.
        """

    @abstractmethod
    def end_session(self, session: SessionKey) -> None:
        """The request is over."""

    @abstractmethod
    def ping(self) -> None:
        """One round trip."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""

    @abstractmethod
    def unregister_kv_cache(self, instance_id: str) -> None:
        """Let go of a rank's cache."""

    def status(self, max_leases: int = 0) -> StatusReply:
        """Nothing is known of the inside of another system."""
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


def shared(request: RegisterKVCache) -> list[PosixShm]:
    """Return the segments of a played cache."""
    return [one for one in request.handles if isinstance(one, PosixShm)]


def taken_s(client: Client, seen_s: float) -> float:
    """Return how long a client's last call took, which its caller saw take `seen_s`."""
    if isinstance(client, ExternalClient) and client.last_s is not None:
        return client.last_s
    return seen_s


class StartedSystem(msgspec.Struct, frozen=True):
    """How another system's server is started."""

    command: tuple[str, ...]
    address: str
    environment: dict[str, str] = {}
    is_ready: str = ""
    """`unix://PATH` or `tcp://HOST:PORT`, which accepts connections when it is."""
