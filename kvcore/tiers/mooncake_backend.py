"""Mooncake Store: memory of many machines as one, moved to and from L1's own pages.

The client lives in a process of ours (`mooncake_process`), started when first asked and
after every failure. What `segment=` adds to the store is that process's memory: it is
lost with it. Memory that must outlive a server belongs to a `mooncake_client`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from kvcore.errors import SetupError
from kvcore.extents import Buffers
from kvcore.shm import Bytes
from kvcore.tiers.backend import Deadline, Usage
from kvcore.tiers.mooncake_client import (
    MAX_PARTS,
    ArenaLocation,
    Channel,
    MooncakeClient,
    StagedTransfer,
)
from kvcore.tiers.mooncake_process import Code, MooncakeRequest, SegmentName, Setup
from kvcore.tiers.tier import (
    FAILED,
    MISSING,
    REJECTED,
    LoadItem,
    LoadOutcome,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    pack_header,
    read_header,
    record_bytes,
)


class MooncakeBackend:
    """`Backend` over a client in a process of its own, which a deadline kills."""

    batch = MAX_PARTS
    num_evicted = 0
    """The master evicts, for all clients."""

    def __init__(self, setup: Setup, prefix: str, num_channels: int) -> None:
        if find_spec("mooncake") is None:
            raise SetupError(
                "Mooncake Store needs its client: pip install 'kvctl[mooncake]'"
            )
        self._setup = setup
        self._prefix = prefix
        self._num_channels = num_channels
        self._lock = threading.Lock()
        self._arena: ArenaLocation | None = None
        self._client: MooncakeClient | None = None

    def attach(self, name: str, arena: Bytes) -> None:
        """Have the client register these bytes when it starts."""
        start = arena.__array_interface__["data"][0]
        self._arena = ArenaLocation(SegmentName(name, arena.nbytes), start)

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """Ask the master for all keys at once."""
        with self._call(deadline) as call:
            return call.exist(self._names(keys))

    def load(
        self, slots: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Get all slots at once."""
        names = self._names([slot.key for slot in slots])
        with self._call(deadline) as call:
            loaded = call.get(names, slots)
        yield from loaded

    def store(
        self, blobs: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Put all blobs that are not there at once: a second put keeps the first."""
        names = self._names([blob.key for blob in blobs])
        with self._call(deadline) as call:
            present = call.exist(names)
            absent = [index for index, there in enumerate(present) if not there]
            outcomes = call.put(
                tuple(names[index] for index in absent),
                [blobs[index] for index in absent],
            )
        stored = [StoreResult.PRESENT] * len(blobs)
        for index, outcome in zip(absent, outcomes, strict=True):
            stored[index] = outcome
        yield from stored

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Remove keys, also from under those that read them."""
        with self._call(deadline) as call:
            return call.ask(MooncakeRequest("remove", self._names(keys))).count(0)

    def usage(self, deadline: Deadline) -> Usage:
        """Only the master's metrics know; a key is asked for."""
        with self._call(deadline) as call:
            call.exist((f"{self._prefix}probe",))
        return Usage()

    def close(self) -> None:
        """Kill the client."""
        with self._lock:
            if self._client is not None:
                self._client.kill()

    def _names(self, keys: Sequence[PartKey]) -> tuple[str, ...]:
        return tuple(f"{self._prefix}{key}" for key in keys)

    @contextmanager
    def _call(self, deadline: Deadline) -> Iterator[_Call]:
        """Lend a channel; an error kills the client, and with it all other calls."""
        client = self._living()
        try:
            with client.channel(deadline) as channel:
                yield _Call(client, channel, deadline)
        except BaseException:
            client.kill()
            raise

    def _living(self) -> MooncakeClient:
        with self._lock:
            if self._client is None or self._client.dead:
                self._client = MooncakeClient(
                    self._setup, self._arena, self._num_channels
                )
            return self._client


class _Call:
    """What one thread asks over one channel until one deadline."""

    def __init__(
        self, client: MooncakeClient, channel: Channel, deadline: Deadline
    ) -> None:
        self._client = client
        self._channel = channel
        self._deadline = deadline

    def ask(self, request: MooncakeRequest) -> list[int]:
        """Return a number for each key."""
        return self._client.ask(self._channel, request, self._deadline)

    def exist(self, names: tuple[str, ...]) -> list[bool]:
        """Say which names the master has."""
        return [code == 1 for code in self.ask(MooncakeRequest("exists", names))]

    def get(
        self, names: tuple[str, ...], slots: Sequence[LoadItem]
    ) -> list[LoadResult]:
        """Fill slots."""
        with self._moving([slot.buffers for slot in slots]) as move:
            codes = self.ask(MooncakeRequest("get", names, move.pieces, move.extra))
            move.take_out()
            headers = [bytes(move.header(index)) for index in range(len(slots))]
        found = zip(names, slots, codes, headers, strict=True)
        return [self._loaded(*one) for one in found]

    def put(
        self, names: tuple[str, ...], blobs: Sequence[StoreItem]
    ) -> list[StoreResult]:
        """Store blobs that are not there."""
        if not blobs:
            return []
        with self._moving([blob.buffers for blob in blobs]) as move:
            for index, blob in enumerate(blobs):
                move.header(index)[:] = pack_header(blob)
            move.put_in()
            codes = self.ask(MooncakeRequest("put", names, move.pieces, move.extra))
        return [_stored(code) for code in codes]

    @contextmanager
    def _moving(self, parts: Sequence[Buffers]) -> Iterator[StagedTransfer]:
        move = StagedTransfer(self._client, self._channel, parts)
        try:
            yield move
        except BaseException:
            self._client.kill()  # Before the memory that it may write into goes.
            raise
        finally:
            move.end()

    def _loaded(
        self, name: str, slot: LoadItem, code: int, header: bytes
    ) -> LoadResult:
        size = record_bytes(slot.buffers)
        if code == size:
            checksum = read_header(header, slot)
            if checksum is not None:
                return LoadResult(LoadOutcome.DONE, checksum)
            return REJECTED
        if code == Code.NOT_FOUND:
            return MISSING
        # An owner that died fails so too, and so does a value of another size.
        there = self.ask(MooncakeRequest("size", (name,)))[0]
        if there >= 0 and there != size:
            return REJECTED
        return FAILED


def _stored(code: int) -> StoreResult:
    if code == 0:
        return StoreResult.DONE
    return StoreResult.FULL if code == Code.NO_ROOM else StoreResult.FAILED
