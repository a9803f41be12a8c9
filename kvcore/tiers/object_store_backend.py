"""Object stores (S3, GCS, Azure, ...) through obstore: one object per part.

A loaded object is copied into L1's pages when all of it has arrived: obstore cannot
read into given memory, and a reply after its deadline must not reach any page.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult

from kvcore.errors import DeadlineExceeded, SetupError, Unavailable
from kvcore.tiers.tier import (
    MISSING,
    Backend,
    Deadline,
    LoadItem,
    LoadResult,
    PartKey,
    StoreItem,
    StoreResult,
    Usage,
)
from kvcore.tiers.tier_url import TierOptions, register_tier

if TYPE_CHECKING:
    from obstore.store import ObjectStore

ResultT = TypeVar("ResultT")

_PROBE = "probe"
"""An object that need not exist."""
_NO_SPACE = ("507", "insufficient storage", "quotaexceeded", "storagefull")
"""Errors of servers that are full; S3 itself never is."""


class ObjectStoreOptions(TierOptions, frozen=True):
    """Options of `s3://`, `gs://` and `az://`; all others are obstore's."""

    threads: int = 8
    other: dict[str, str] = {}


class ObjectStoreBackend(Backend):
    """`Backend` over any store that obstore opens."""

    def __init__(self, url: SplitResult, options: ObjectStoreOptions) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise SetupError(
                "object stores need obstore: pip install 'kvctl[objects]'"
            ) from None
        self._api = obstore
        client = {
            "timeout": f"{int(options.timeout * 1000)}ms",
            "allow_http": options.other.get("endpoint", "").startswith("http:"),
        }
        config: dict[str, Any] = {
            **options.other,
            "client_options": client,
            "retry_config": {"max_retries": 0},  # The tier retries.
        }
        try:
            place = url._replace(query="").geturl()
            self._store: ObjectStore = from_url(place, **config)
        except obstore.exceptions.BaseError as error:
            raise SetupError(_first_line(error)) from None

    def contains(self, keys: Sequence[PartKey], deadline: Deadline) -> list[bool]:
        """Send one request per key, all at once: there is none for many."""
        return self._run(_gather(self._exists, keys), deadline)

    def load(
        self, items: Sequence[LoadItem], deadline: Deadline
    ) -> Iterator[LoadResult]:
        """Get, then copy."""
        for item in items:
            value = self._run(self._get(item), deadline)
            yield MISSING if value is None else item.fill(value)

    def store(
        self, items: Sequence[StoreItem], deadline: Deadline
    ) -> Iterator[StoreResult]:
        """Put copies of the absent items: an upload may outlive the deadline."""
        for item in items:
            is_present = self._run(self._exists(item.key), deadline)
            yield StoreResult.PRESENT if is_present else self._put(item, deadline)

    def delete(self, keys: Sequence[PartKey], deadline: Deadline) -> int:
        """Delete all keys; object stores do not report which were present."""
        self._run(_gather(self._remove, keys), deadline)
        return len(keys)

    def usage(self, deadline: Deadline) -> Usage:
        """Query one object; the size is unknown without a full listing."""
        self._run(self._exists(_PROBE), deadline)
        return Usage()

    async def _exists(self, key: PartKey | str) -> bool:
        with suppress(FileNotFoundError):
            await self._api.head_async(self._store, str(key))
            return True
        return False

    async def _get(self, item: LoadItem) -> memoryview | None:
        with suppress(FileNotFoundError):
            result = await self._api.get_async(self._store, str(item.key))
            if result.meta["size"] != item.record_bytes:
                return memoryview(b"")  # A foreign object may exceed the memory.
            return memoryview(await result.buffer_async())
        return None

    async def _remove(self, key: PartKey) -> None:
        with suppress(FileNotFoundError):
            await self._api.delete_async(self._store, str(key))

    async def _upload(self, item: StoreItem) -> None:
        put = self._api.put_async
        await put(self._store, str(item.key), item.record(), use_multipart=False)

    def _put(self, item: StoreItem, deadline: Deadline) -> StoreResult:
        try:
            self._run(self._upload(item), deadline)
        except Unavailable as error:
            if any(mark in error.message.lower() for mark in _NO_SPACE):
                return StoreResult.FULL
            raise
        return StoreResult.DONE

    def _run(self, work: Coroutine[Any, Any, ResultT], deadline: Deadline) -> ResultT:
        """Run in an event loop of this call, and drop it at the deadline."""

        async def bounded() -> ResultT:
            return await asyncio.wait_for(work, deadline.at - time.monotonic())

        try:
            return asyncio.run(bounded())
        except TimeoutError:
            raise DeadlineExceeded("the store has not answered in time") from None
        except (self._api.exceptions.BaseError, OSError) as error:
            raise Unavailable(_first_line(error)) from error


async def _gather(
    call: Callable[[PartKey], Awaitable[ResultT]], keys: Sequence[PartKey]
) -> list[ResultT]:
    return await asyncio.gather(*map(call, keys))


def _first_line(error: Exception) -> str:
    """Shorten a long error to its first line and the server's reason."""
    text = str(error)
    reason = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    first = text.partition("\n")[0].partition("<?xml")[0]
    return f"{first}{reason[1]}" if reason else first


for _scheme in ("s3", "gs", "az"):
    register_tier(_scheme, ObjectStoreBackend, ObjectStoreOptions)
