"""Object stores (S3, GCS, Azure, ...) through obstore: an object a part.

What comes back is copied into L1's pages here, when all of it has arrived: obstore
cannot read into memory of ours, and an answer after its deadline then finds no page.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from kvcore.errors import DeadlineExceeded, SetupError, Unavailable
from kvcore.shm import Bytes
from kvcore.tiers.backend import Deadline, Usage
from kvcore.tiers.tier import (
    HEADER_BYTES,
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

if TYPE_CHECKING:
    from obstore.store import ObjectStore

ResultT = TypeVar("ResultT")

_PROBE = "probe"
"""An object that need not be there."""
_NO_ROOM = ("507", "insufficient storage", "quotaexceeded", "storagefull")
"""How servers say that they are full; S3 itself never is."""


class ObjectsBackend:
    """`Backend` over whatever obstore opens from a URL."""

    batch = 1
    num_evicted = 0
    """A lifecycle rule may remove objects; nobody tells us."""

    def __init__(
        self, url: str, config: Mapping[str, str], *, insecure: bool, timeout_s: float
    ) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise SetupError(
                "object stores need obstore: pip install 'kvctl[objects]'"
            ) from None
        self._api = obstore
        client = {"timeout": f"{int(timeout_s * 1000)}ms", "allow_http": insecure}
        options: dict[str, Any] = dict(config)
        if not url.startswith("memory:"):
            # Trying again is the tier's affair.
            options |= {"client_options": client, "retry_config": {"max_retries": 0}}
        try:
            self._store: ObjectStore = from_url(url, **options)
        except obstore.exceptions.BaseError as error:
            raise SetupError(_brief(error)) from None

    def attach(self, name: str, arena: Bytes) -> None:
        """Nothing to do: obstore has memory of its own."""

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """Ask for all keys at once: there is no request for many."""
        return self._run(self._each(self._exists, keys), deadline)

    def load(
        self, slots: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Get, then copy."""
        for slot in slots:
            value = self._run(self._get(slot), deadline)
            yield MISSING if value is None else _fill(slot, value)

    def store(
        self, blobs: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Put what is not there, out of a copy: it may outlive the deadline."""
        for blob in blobs:
            if self._run(self._exists(blob.key), deadline):
                yield StoreResult.PRESENT
                continue
            value = b"".join([pack_header(blob), *blob.buffers])
            yield self._put(blob.key, value, deadline)

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Delete all keys; object stores do not tell which were there."""
        self._run(self._each(self._remove, keys), deadline)
        return len(keys)

    def usage(self, deadline: Deadline) -> Usage:
        """Nobody knows without listing everything; an object is asked for."""
        self._run(self._exists(_PROBE), deadline)
        return Usage()

    def close(self) -> None:
        """Nothing to do: connections end with the store."""

    async def _each(
        self, ask: Callable[[PartKey], Awaitable[ResultT]], keys: Sequence[PartKey]
    ) -> list[ResultT]:
        return await asyncio.gather(*map(ask, keys))

    async def _exists(self, key: PartKey | str) -> bool:
        try:
            await self._api.head_async(self._store, str(key))
        except FileNotFoundError:
            return False
        return True

    async def _get(self, slot: LoadItem) -> memoryview | None:
        try:
            result = await self._api.get_async(self._store, str(slot.key))
            if result.meta["size"] != record_bytes(slot.buffers):
                return memoryview(b"")  # Somebody's terabyte is not for our memory.
            return memoryview(await result.buffer_async())
        except FileNotFoundError:
            return None

    async def _remove(self, key: PartKey) -> None:
        with suppress(FileNotFoundError):
            await self._api.delete_async(self._store, str(key))

    async def _upload(self, key: PartKey, value: bytes) -> None:
        put = self._api.put_async
        await put(self._store, str(key), value, use_multipart=False)

    def _put(self, key: PartKey, value: bytes, deadline: Deadline) -> StoreResult:
        try:
            self._run(self._upload(key, value), deadline)
        except Unavailable as error:
            if any(mark in error.message.lower() for mark in _NO_ROOM):
                return StoreResult.FULL
            raise
        return StoreResult.DONE

    def _run(self, work: Coroutine[Any, Any, ResultT], deadline: Deadline) -> ResultT:
        """Run in a loop of this call's own, and drop it at the deadline."""

        async def bounded() -> ResultT:
            return await asyncio.wait_for(work, deadline.at - time.monotonic())

        try:
            return asyncio.run(bounded())
        except TimeoutError:
            raise DeadlineExceeded("the store has not answered in time") from None
        except (self._api.exceptions.BaseError, OSError) as error:
            raise Unavailable(_brief(error)) from error


def _fill(slot: LoadItem, value: memoryview) -> LoadResult:
    if value.nbytes != record_bytes(slot.buffers):
        return REJECTED
    checksum = read_header(value, slot)
    if checksum is None:
        return REJECTED
    start = HEADER_BYTES
    for buffer in slot.buffers:
        buffer[:] = value[start : start + buffer.nbytes]
        start += buffer.nbytes
    return LoadResult(LoadOutcome.DONE, checksum)


def _brief(error: Exception) -> str:
    """Shorten what runs over many lines to the first, and the server's own reason."""
    text = str(error)
    reason = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    first = text.partition("\n")[0].partition("<?xml")[0]
    return f"{first}{reason[1]}" if reason else first
