"""A client that copies its own caches: it asks for room and holds, and no more.

The server's process never touches the cache, so the cache needs no shared memory;
this process maps the arena instead, once a run of the server.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Lock, Thread
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
    MappedCache,
    Memory,
    OpenWorkerMemory,
    RunningCopies,
)

R = TypeVar("R")
TicketReply = TypeVar("TicketReply", ReserveReply, HoldReply)


class CopyingClient(KVClient):
    """A `KVClient` whose process moves the bytes of what it registers with `memory`.

    Calls, replies and errors are the same. An instance that is registered without is
    copied by the server as ever. `submit_*` copies on a thread a direction of the
    instance, the plain name in the calling thread; one store and one retrieve of an
    instance go on at a time.

    A retrieve ends by its deadline when it has not begun to write: its blocks are
    this process's own. What is closed or unregistered waits for copies under way.
    """

    def __init__(
        self, address: str, *, label: str = "", timeout_s: float = 30.0
    ) -> None:
        self._own: dict[str, MappedCache] = {}
        self._arena: Segment | None = None
        self._lock = Lock()
        self._under_way = RunningCopies("the client was closed", Closed)
        super().__init__(address, label=label, timeout_s=timeout_s)
        self._connection.runs.on_leave.append(self._unmap)

    def close(self) -> None:
        """Wait for copies under way, then say goodbye and let go of the arena.

        A future's callback does not wait for the last: who waits for an answer, which
        that thread takes in, may have a cache's turn.
        """
        self._under_way.close()
        super().close()
        if self._connection.is_served_here:
            Thread(target=self._forget_all).start()
        else:
            self._forget_all()

    def _forget_all(self) -> None:
        for instance_id in list(self._own):
            self._forget(instance_id)
        self._unmap()

    # -- registration -------------------------------------------------------------

    def register_kv_cache(
        self,
        request: Registration,
        memory: Memory = (),
        open_own: OpenWorkerMemory = HostWorkerMemory,
    ) -> RegisterReply:
        """Register a cache, now and with every later run of the server.

        `memory` is what its handles stand for, flat and writable, one for each, and
        stays the instance's until it is unregistered. `open_own` reaches memory of
        another kind than the host's.
        """
        if not memory:
            return super().register_kv_cache(request)
        if isinstance(request, CBRegisterKVCache):
            raise BadRequest("a blend buffer is copied by the server")
        private = replace(
            request, handles=tuple(Private(part.nbytes) for part in memory)
        )
        instance_id = request.instance_id
        own = MappedCache(instance_id, request.groups, memory, open_own)
        replaced: list[MappedCache | None] = []

        def told(reply: RegisterReply) -> None:
            if not replaced:
                replaced.append(self._own.get(instance_id))
                self._own[instance_id] = own
            self._map(own, reply)

        try:
            reply = self._connection.register(private, self.timeout_s, told)
            own.wait()
        except BaseException:
            if replaced:
                with suppress(KVError):  # What is wrong has been said.
                    self.unregister(UnregisterKVCache(instance_id))
            raise
        finally:
            for earlier in filter(None, replaced):
                earlier.close()
        return reply

    def unregister(self, request: UnregisterKVCache | CBUnregisterKVCache) -> Done:
        """Forget a cache or a buffer; its running copies have ended."""
        self._forget(request.instance_id)
        return super().unregister(request)

    def _forget(self, instance_id: str) -> None:
        own = self._own.pop(instance_id, None)
        if own is not None:
            own.close()

    def _map(self, own: MappedCache, reply: RegisterReply) -> None:
        """Map the arena that a run of the server says it has; opened behind."""
        handle = reply.arena
        if handle is None:
            raise BadRequest("the server did not say where its chunks lie")
        memory = handle.memory
        with self._lock:
            if self._arena is None or self._arena.name != memory.name:
                self._let_go()
                arena = self._arena = Segment.attach(
                    memory.name, offset=memory.offset, length=memory.length
                )
                warming = (arena.array, lambda: self._arena is arena)
                Thread(target=populate, args=warming, daemon=True).start()
            own.map(self._arena, self.chunk_size, checksums=handle.checksums)

    def _unmap(self) -> None:
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        """A server that is gone has no memory back before its last mapping goes."""
        for own in list(self._own.values()):
            own.unmap()
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
        """Send a request, or copy for it on the thread of its direction."""
        copying = self._copying(request, timeout_s, retry)
        if copying is None:
            return super().submit(request, timeout_s, retry)
        return copying.direction.submit(copying.run)

    def call(
        self,
        request: Request[R],
        timeout_s: float | None = None,
        retry: Retry | None = None,
    ) -> R:
        """Send a request, or copy for it, and wait."""
        copying = self._copying(request, timeout_s, retry)
        if copying is None:
            return super().call(request, timeout_s, retry)
        result: R = copying.run()
        return result

    def _copying(
        self, request: Request[R], timeout_s: float | None, retry: Retry | None
    ) -> _RunningCopy | None:
        """Return what is to be done here; None for what the server does."""
        if not isinstance(request, Store | Retrieve):
            return None
        own = self._own.get(request.instance_id)
        if own is None:
            return None
        if request.event:
            raise BadRequest("event: who copies itself waits for it before it asks")
        deadline_ns = monotonic_ns() + int((timeout_s or self.timeout_s) * 1e9)
        if isinstance(request, Store):
            run = partial(self._store, own, request, retry, deadline_ns)
            return _RunningCopy(own.stores, run)
        return _RunningCopy(
            own.retrieves, partial(self._retrieve, own, request, retry, deadline_ns)
        )

    def _store(
        self, own: MappedCache, store: Store, retry: Retry | None, deadline_ns: int
    ) -> StoreReply:
        with own.stores.turn():
            again = _wrapped(Reserve, retry)
            reply = self._ask(Reserve(store), again, deadline_ns, Abort)
            if reply.ticket is None:
                return StoreReply(0, reply.num_present, reply.num_dropped)
            try:
                mapped = own.mapped(reply.arena)
                with self._under_way.one(), mapped.copy():
                    checksums = mapped.gather(store, reply.parts)
                if monotonic_ns() > deadline_ns:
                    raise DeadlineExceeded("the deadline passed; nothing was kept")
            except BaseException:
                self._tell(Abort(reply.ticket))
                raise
            commit = Commit(reply.ticket, memoryview(b"".join(checksums)))
            return self._end(commit, own, reply.arena, _left_s(deadline_ns))

    def _retrieve(
        self,
        own: MappedCache,
        retrieve: Retrieve,
        retry: Retry | None,
        deadline_ns: int,
    ) -> RetrieveReply:
        with own.retrieves.turn():
            again = _wrapped(Hold, retry)
            reply = self._ask(Hold(retrieve), again, deadline_ns, Release)
            if reply.ticket is None:
                return RetrieveReply(0)
            wrong: list[int] = []
            try:
                mapped = own.mapped(reply.arena)
                with self._under_way.one(), mapped.copy():
                    wrong = mapped.find_wrong(reply.parts)
                    if wrong:
                        raise ChunksMissing("a chunk's bytes were found wrong")
                    num_bytes = mapped.scatter(retrieve, reply.parts)
            except BaseException:
                self._tell(Release(reply.ticket, wrong=tuple(wrong)))
                raise
            release = Release(reply.ticket, num_bytes)
            return self._end(release, own, reply.arena, self.timeout_s)

    def _ask(
        self,
        request: Request[TicketReply],
        retry: Retry | None,
        deadline_ns: int,
        end: Callable[[int], Request[Any]],
    ) -> TicketReply:
        """Ask for a ticket. One that comes too late is ended at once."""

        def late(reply: ReserveReply | HoldReply) -> None:
            if reply.ticket is not None:
                self._tell(end(reply.ticket))

        return self._connection.call(request, _left_s(deadline_ns), retry, late)

    def _tell(self, end: Request[Any]) -> None:
        """Have a ticket ended without waiting for it."""
        with suppress(Closed):  # Then all have ended.
            self.submit(end)

    def _end(
        self, end: Request[R], own: MappedCache, arena: str, timeout_s: float
    ) -> R:
        try:
            return self.call(end, timeout_s)
        except UnknownTicket:
            own.mapped(arena)  # Unavailable, if another run of the server said so.
            raise


@dataclass(frozen=True, slots=True)
class _RunningCopy:
    """A copy to be made here, and where it waits for its turn."""

    direction: CopyQueue
    run: Callable[[], Any]


def _wrapped(kind: Callable[[Any], Request[Any]], retry: Retry | None) -> Retry | None:
    """Send again what a request for a ticket is about."""
    if retry is None:
        return None

    def again(error: KVError) -> Request[Any] | None:
        inner = retry(error)
        return None if inner is None else kind(inner)

    return again


def _left_s(deadline_ns: int) -> float:
    return (deadline_ns - monotonic_ns()) / 1e9
