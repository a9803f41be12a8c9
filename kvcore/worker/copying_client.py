"""Client that copies between its own caches and the server's arena.

The client process maps the arena, once per server process. The server only reserves
space for stores and holds chunks for retrieves; the caches need no shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from threading import RLock, Thread
from time import monotonic_ns
from typing import Any, TypeVar

from msgspec.structs import replace

from kvcore.client.client import KVClient
from kvcore.client.pending_requests import Retry
from kvcore.client.reconnect import Registration
from kvcore.errors import (
    BadRequest,
    ChunksMissing,
    Closed,
    DeadlineExceeded,
    KVError,
    UnknownTicket,
)
from kvcore.protocol import (
    Abort,
    CBRegisterKVCache,
    CBUnregisterKVCache,
    Commit,
    Done,
    Hold,
    HoldReply,
    Private,
    RegisterReply,
    Release,
    Request,
    Reserve,
    ReserveReply,
    Retrieve,
    RetrieveReply,
    Store,
    StoreReply,
    UnregisterKVCache,
)
from kvcore.shm import Segment, populate
from kvcore.worker.mapped_arena import (
    CopyQueue,
    HostWorkerMemory,
    MappedArena,
    MappedCache,
    Memory,
    OpenWorkerMemory,
    RunningCopies,
)

R = TypeVar("R")
TicketReply = TypeVar("TicketReply", ReserveReply, HoldReply)


class CopyingClient(KVClient):
    """A `KVClient` that copies the caches that it registers with `memory`.

    Calls, replies and errors are those of `KVClient`. The server copies instances that
    are registered without `memory`. `submit_store` and `submit_retrieve` copy on one
    thread per instance and direction, `store` and `retrieve` in the calling thread. At
    most one store and one retrieve per instance run at a time.

    A retrieve that has not started to write ends at its deadline, since its blocks
    belong to this process. `close` and `unregister_kv_cache` wait for running copies.
    """

    def __init__(
        self,
        address: str,
        *,
        label: str = "",
        timeout_s: float = 30.0,
        engine_key: bytes | None = None,
    ) -> None:
        self._caches: dict[str, MappedCache] = {}
        self._arena: Segment | None = None
        self._lock = RLock()
        self._running_copies = RunningCopies("the client was closed", Closed)
        super().__init__(
            address, label=label, timeout_s=timeout_s, engine_key=engine_key
        )
        self._connection.reconnect.on_disconnect.append(self._unmap_arena)

    def close(self) -> None:
        """Wait for running copies, close the connection and unmap the arena.

        In a future's callback, the unmapping happens in another thread: a cache's lock
        may be held by a thread that waits for a reply, which only the callback's
        thread can receive.
        """
        self._running_copies.close()
        super().close()
        if self._connection.is_serving_thread:
            Thread(target=self._close_caches).start()
        else:
            self._close_caches()

    def _close_caches(self) -> None:
        for instance_id in list(self._caches):
            self._close_cache(instance_id)
        self._unmap_arena()

    # -- registration -------------------------------------------------------------

    def register_kv_cache(
        self,
        request: Registration,
        memory: Memory = (),
        open_memory: OpenWorkerMemory = HostWorkerMemory,
    ) -> RegisterReply:
        """Register a cache, now and after every restart of the server.

        Args:
            request: the registration; its handles are replaced.
            memory: one flat, writable buffer per handle, in use until the instance is
                unregistered. Empty: the server copies, with the request's handles.
            open_memory: opens memory of another kind than the host's.
        """
        if not memory:
            return super().register_kv_cache(request)
        if isinstance(request, CBRegisterKVCache):
            raise BadRequest("a blend buffer is copied by the server")
        private = replace(
            request, handles=tuple(Private(part.nbytes) for part in memory)
        )
        instance_id = request.instance_id
        cache = MappedCache(instance_id, request.groups, memory, open_memory)
        replaced: list[MappedCache | None] = []

        def on_registered(reply: RegisterReply) -> None:
            if not replaced:
                replaced.append(self._caches.get(instance_id))
                self._caches[instance_id] = cache
            self._attach(cache, reply)

        try:
            reply = self._connection.register(private, self.timeout_s, on_registered)
            cache.wait()
        except BaseException:
            if replaced:
                with suppress(KVError):  # The first error is raised.
                    self.unregister(UnregisterKVCache(instance_id))
            raise
        finally:
            for earlier in filter(None, replaced):
                earlier.close()
        return reply

    def unregister(self, request: UnregisterKVCache | CBUnregisterKVCache) -> Done:
        """Wait for the running copies of a cache, and unregister it."""
        self._close_cache(request.instance_id)
        return super().unregister(request)

    def _close_cache(self, instance_id: str) -> None:
        cache = self._caches.pop(instance_id, None)
        if cache is not None:
            cache.close()

    def _attach(self, cache: MappedCache, reply: RegisterReply) -> None:
        """Map the arena of a registration's reply; a thread of the cache opens it."""
        handle = reply.arena
        if handle is None:
            raise BadRequest("the registration's reply names no arena")
        memory = handle.memory
        with self._lock:
            if self._arena is None or self._arena.name != memory.name:
                self._unmap_arena()
                arena = self._arena = Segment.attach(
                    memory.name, offset=memory.offset, length=memory.length
                )
                warming = (arena.array, lambda: self._arena is arena)
                Thread(target=populate, args=warming, daemon=True).start()
            cache.map(self._arena, self.chunk_size, checksums=handle.checksums)

    def _unmap_arena(self) -> None:
        """Unmap the arena; the system frees its memory with the last mapping."""
        with self._lock:
            for cache in list(self._caches.values()):
                cache.unmap()
            if self._arena is not None:
                self._arena.close()
                self._arena = None

    # -- copies -------------------------------------------------------------------

    def submit(
        self,
        request: Request[R],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> Future[R]:
        """Send a request, or queue a local copy."""
        local = self._local_copy(request, timeout_s, retry)
        if local is None:
            return super().submit(request, timeout_s, retry)
        queue, copy = local
        return queue.submit(copy)

    def call(
        self,
        request: Request[R],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> R:
        """Send a request or copy locally, and wait."""
        local = self._local_copy(request, timeout_s, retry)
        if local is None:
            return super().call(request, timeout_s, retry)
        _, copy = local
        result: R = copy()
        return result

    def _local_copy(
        self, request: Request[Any], timeout_s: float | None, retry: Retry | None
    ) -> tuple[CopyQueue, Callable[[], Any]] | None:
        """Return a copy in this process and its queue; None if the server copies."""
        if not isinstance(request, Store | Retrieve):
            return None
        cache = self._caches.get(request.instance_id)
        if cache is None:
            return None
        if request.event:
            raise BadRequest("event: wait for the event before the call")
        deadline_ns = monotonic_ns() + int((timeout_s or self.timeout_s) * 1e9)
        if isinstance(request, Store):
            return cache.stores, partial(
                self._store, cache, request, retry, deadline_ns
            )
        return cache.retrieves, partial(
            self._retrieve, cache, request, retry, deadline_ns
        )

    def _store(
        self, cache: MappedCache, store: Store, retry: Retry | None, deadline_ns: int
    ) -> StoreReply:
        with cache.stores.exclusive():
            reply = self._request_ticket(Reserve, Abort, store, retry, deadline_ns)
            ticket = reply.ticket
            if ticket is None:
                return StoreReply(0, reply.num_present, reply.num_dropped)
            with self._copying(cache, reply.arena, lambda: Abort(ticket)) as mapped:
                checksums = mapped.gather(store, reply.parts)
                if monotonic_ns() > deadline_ns:
                    raise DeadlineExceeded("the deadline passed; nothing was kept")
            commit = Commit(ticket, memoryview(b"".join(checksums)))
            return self._end_ticket(
                commit, cache, reply.arena, _remaining_s(deadline_ns)
            )

    def _retrieve(
        self,
        cache: MappedCache,
        retrieve: Retrieve,
        retry: Retry | None,
        deadline_ns: int,
    ) -> RetrieveReply:
        with cache.retrieves.exclusive():
            reply = self._request_ticket(Hold, Release, retrieve, retry, deadline_ns)
            ticket, wrong = reply.ticket, list[int]()
            if ticket is None:
                return RetrieveReply(0)
            with self._copying(
                cache, reply.arena, lambda: Release(ticket, wrong=tuple(wrong))
            ) as mapped:
                wrong += mapped.find_wrong(reply.parts)
                if wrong:
                    raise ChunksMissing("a chunk's bytes were found wrong")
                num_bytes = mapped.scatter(retrieve, reply.parts)
            release = Release(ticket, num_bytes)
            return self._end_ticket(release, cache, reply.arena, self.timeout_s)

    def _request_ticket(
        self,
        kind: Callable[[Any], Request[TicketReply]],
        end: Callable[[int], Request[Any]],
        request: Request[Any],
        retry: Retry | None,
        deadline_ns: int,
    ) -> TicketReply:
        """Request a ticket. One that arrives after the deadline is ended."""

        def retry_ticket(error: KVError) -> Request[Any] | None:
            again = retry(error) if retry else None
            return None if again is None else kind(again)

        def end_late(reply: ReserveReply | HoldReply) -> None:
            if reply.ticket is not None:
                self._send_end(end(reply.ticket))

        return self._connection.call(
            kind(request), _remaining_s(deadline_ns), retry_ticket, end_late
        )

    @contextmanager
    def _copying(
        self, cache: MappedCache, arena: str, end: Callable[[], Request[Any]]
    ) -> Iterator[MappedArena]:
        """Provide the mapped arena for a copy; if the copy fails, send `end()`."""
        try:
            mapped = cache.mapped(arena)
            with self._running_copies.track(), mapped.copies.track():
                yield mapped
        except BaseException:
            self._send_end(end())
            raise

    def _send_end(self, end: Request[Any]) -> None:
        """End a ticket without waiting for the reply."""
        with suppress(Closed):  # The server ends the tickets of a closed connection.
            self.submit(end)

    def _end_ticket(
        self, end: Request[R], cache: MappedCache, arena: str, timeout_s: float
    ) -> R:
        try:
            return self.call(end, timeout_s)
        except UnknownTicket:
            cache.mapped(arena)  # Raises Unavailable if the server has restarted.
            raise


def _remaining_s(deadline_ns: int) -> float:
    return (deadline_ns - monotonic_ns()) / 1e9
