"""A server in one thread's hands: lanes, memory and a loop that move when told to.

Whatever would run beside the socket loop is a strand: it goes on when a test says so,
as far as its next pause, and never at the same time as anything else.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from threading import Semaphore, Thread, local
from typing import Any

import msgspec

from kvcore.copy.host_cache import HostCache
from kvcore.copy.paged_cache import ChunkCopier
from kvcore.engine.engine import Engine
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.errors import HandleError, KVError, UnknownInstance
from kvcore.layout import KVLayout
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import PROTOCOL_VERSION, BootToken, Hello, PosixShm, Request
from kvcore.server.client_table import Client, ClientTable
from kvcore.server.event_loop import EventLoop, RequestTask
from kvcore.shm import Bytes
from kvcore.wire import REQUESTS, RequestEnvelope, encode_reply, wire_name
from kvcore.worker.ticket_service import TicketService

_here = local()


class Strand:
    """A call that stops at every `pause` until it is resumed."""

    def __init__(self, call: Callable[[], None], future: Future[Any]) -> None:
        self.future = future
        self.is_done = False
        self._call = call
        self._go = Semaphore(0)
        self._stopped = Semaphore(0)
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _here.strand = self
        self._go.acquire()
        self._call()
        self.is_done = True
        self._stopped.release()

    def resume(self) -> None:
        """Go on to the next pause, or to the end."""
        self._go.release()
        self._stopped.acquire()
        if self.is_done:
            self._thread.join()

    def pause(self) -> None:
        """Stop here; called by what the strand runs."""
        self._stopped.release()
        self._go.acquire()


def current() -> Strand | None:
    """Return the strand that runs, None in a test's own thread."""
    return getattr(_here, "strand", None)


def pause() -> None:
    """Stop the strand that runs here, if one does."""
    strand = current()
    if strand is not None:
        strand.pause()


class PlayedFuture(Future[Any]):
    """Waiting for it is a pause."""

    def result(self, timeout: float | None = None) -> Any:
        """Return what was set, once it was."""
        while not self.done() and current() is not None:
            pause()
        return super().result(timeout)


class ManualLane(Executor):
    """One thread's executor: calls run one by one, as far as `resume` takes them."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._strand: Strand | None = None
        self._is_shut = False

    @property
    def is_busy(self) -> bool:
        """Something runs or waits."""
        return self._strand is not None or bool(self._queue)

    def submit(self, call: Any, /, *args: Any, **named: Any) -> Future[Any]:
        """Queue a call."""
        if self._is_shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        self._queue.append((future, lambda: call(*args, **named)))
        return future

    def resume(self) -> None:
        """Begin the next call, or go on with the one that runs."""
        if self._strand is None:
            if not self._queue:
                return
            future, call = self._queue.popleft()
            if not future.set_running_or_notify_cancel():
                return

            def run() -> None:
                try:
                    result = call()
                except BaseException as error:  # noqa: BLE001 - as an executor does
                    future.set_exception(error)
                else:
                    future.set_result(result)

            self._strand = Strand(run, future)
        self._strand.resume()
        if self._strand.is_done:
            self._strand = None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; wait as a strand does, else see to the end of it."""
        self._is_shut = True
        while cancel_futures and self._queue:
            future, _ = self._queue.popleft()
            future.cancel()
            future.set_running_or_notify_cancel()
        while wait and self.is_busy:
            if current() is None:
                self.resume()
            else:
                pause()


class PlayedMemory:
    """An instance's arrays; copies and the worker's event stop where others may run."""

    event = b""

    def __init__(self, layouts: Sequence[KVLayout], arrays: Sequence[Bytes]) -> None:
        self.caches = tuple(HostCache(layout, arrays, 1) for layout in layouts)
        self.is_abandoned = False
        self.is_closed = False

    def wait(self, event: bytes, check: Callable[[], None]) -> None:
        """With an event, wait for it for as long as one pause."""
        if event:
            pause()
            if self.is_abandoned:
                raise UnknownInstance("its client is gone")
            check()

    def record(self) -> None:
        """Do nothing."""

    def abandon(self) -> None:
        """Wait no more."""
        self.is_abandoned = True

    def close(self) -> None:
        """Note it."""
        assert not self.is_closed
        self.is_closed = True
        for cache in self.caches:
            cache.close()


class ManualTransport:
    """Named arrays of this process in place of shared memory."""

    def __init__(self) -> None:
        self.arrays: dict[str, Bytes] = {}
        self.memories: list[PlayedMemory] = []
        self.pending: list[Callable[[bool], None]] = []
        """Call one to have memory attached, or not."""
        self.is_slow = False
        """Attach nothing at once."""

    def attach(
        self, handles: Sequence[PosixShm], layouts: Sequence[KVLayout]
    ) -> Future[Any]:
        """Reach the arrays."""
        future = PlayedFuture()

        def attach(well: bool) -> None:
            if not well:
                future.set_exception(HandleError("no such memory"))
                return
            arrays = [self.arrays[handle.name] for handle in handles]
            memory = PlayedMemory(layouts, arrays)
            self.memories.append(memory)
            future.set_result(memory)

        if self.is_slow:
            self.pending.append(attach)
        else:
            attach(True)
        return future

    def devices(self) -> tuple[()]:
        """Have none."""
        return ()

    def close(self) -> None:
        """Do nothing."""


class ManualCopier(ChunkCopier):
    """Stops before and after every copy."""

    def gather(self, *args: Any, **named: Any) -> Any:
        """See `ChunkCopier`."""
        pause()
        made = super().gather(*args, **named)
        pause()
        return made

    def scatter(self, *args: Any, **named: Any) -> Any:
        """See `ChunkCopier`."""
        pause()
        made = super().scatter(*args, **named)
        pause()
        return made


@dataclass
class Answers:
    """Told what becomes of requests, by their ids."""

    running: Callable[[int, DeferredReply], None]
    answered: Callable[[int, msgspec.Struct | Exception], None]


class ManualLoop(EventLoop):
    """The server's loop without its socket: requests come by a call, slices too."""

    def __init__(
        self,
        engine: Engine,
        copies: TicketService,
        answers: Answers,
        clock: Callable[[], float],
    ) -> None:
        clients = ClientTable(5.0, self.watch, self.unwatch, clock)
        super().__init__(None, BootToken(1), clients, 1000, 1 << 30)  # type: ignore[arg-type]
        self._answers = answers
        self._num_asked = 0
        self._on_gone = self._undo(engine)
        table = {**engine.handlers(), **copies.handlers()}
        self._handlers = {
            wire_name(kind): self._handler(serve) for kind, serve in table.items()
        }

    def _undo(self, engine: Engine) -> Callable[[Client], None]:
        def undo(client: Client) -> None:
            engine.end_client(client.identity)
            engine.run_after_close(lambda: None)

        return undo

    def _handler(
        self, serve: Callable[[Any, RequestContext], Any]
    ) -> Callable[..., Any]:
        def handler(request: Any, client: Client, deadline_ns: int) -> Any:
            watched = client.pidfd is not None
            return serve(
                request,
                RequestContext(client.identity, client.pid, deadline_ns, watched),
            )

        return handler

    def greet(self, identity: bytes) -> None:
        """Take in a client that lives in this process."""
        pid = os.getpid()
        hello = Hello(PROTOCOL_VERSION, pid, start_time(pid) or 0, pid_namespace())
        self._clients.add(identity, hello)

    def next_id(self) -> int:
        """Number the next request."""
        self._num_asked += 1
        return self._num_asked

    def ask(
        self, number: int, identity: bytes, request: Request[Any], deadline_ns: int = 0
    ) -> None:
        """Receive a request; what is short is answered here."""
        client = self._clients.get(identity)
        assert client is not None
        name = wire_name(type(request))
        envelope = RequestEnvelope(
            number, name, "", self._boot, deadline_ns, msgspec.Raw()
        )
        self._start(client, envelope, REQUESTS[name], request, 0)

    def kill(self, identity: bytes) -> None:
        """Do what is done when a client's pidfd wakes the loop."""
        client = self._clients.get(identity)
        assert client is not None
        self._gone(client)

    def step(self) -> bool:
        """Run one slice, if there is one."""
        has_one = bool(self._sliced)
        self._step()
        return has_one

    def look_around(self) -> bool:
        """Answer what has ended on other threads, if anything has."""
        has_one = bool(self._finished)
        self.finish()
        return has_one

    def close(self) -> None:
        """Forget the clients, too."""
        self._clients.close()
        super().close()

    def _settle(
        self, task: RequestTask, result: msgspec.Struct | DeferredReply
    ) -> None:
        if isinstance(result, DeferredReply):
            self._answers.running(task.request_id, result)
        super()._settle(task, result)

    def _reply(self, task: RequestTask, reply: msgspec.Struct) -> None:
        encode_reply(task.request_id, reply)
        self._end(task)
        self._answers.answered(task.request_id, reply)

    def _fail(self, task: RequestTask, error: Exception) -> None:
        if not isinstance(error, KVError):
            raise error
        self._end(task)
        self._answers.answered(task.request_id, error)
