"""Assembly of a whole server: construction, request table, status, shutdown."""

from __future__ import annotations

import gc
import logging
import os
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import socketpair
from time import monotonic, monotonic_ns
from typing import Any

import msgspec
from msgspec.structs import replace

from kvcore import __version__
from kvcore.config import ServerConfig
from kvcore.copy.memory_transports import Transport, TransportTable
from kvcore.engine.engine import Engine
from kvcore.engine.request_context import RequestContext
from kvcore.engine.tiering import OpenTiering, no_tiering
from kvcore.errors import BadRequest, SetupError
from kvcore.extensions import Extensions, ServiceHandler, load_extensions
from kvcore.keys import HASH_ALGORITHM, ScopedKey
from kvcore.process import pid_namespace, start_time
from kvcore.protocol import (
    PROTOCOL_VERSION,
    BootToken,
    ChunkSize,
    CudaIpc,
    Done,
    GetChunkSize,
    Goodbye,
    Hello,
    HelloReply,
    MemoryHandle,
    Ping,
    Pong,
    Request,
    Status,
    StatusReply,
)
from kvcore.server.client_table import Client, ClientTable
from kvcore.server.event_loop import EventLoop, Handler
from kvcore.server.listener import bind
from kvcore.server.metrics import serve_metrics
from kvcore.server.recorder import Recorder
from kvcore.shm import SEGMENT_PREFIX, remove_dead
from kvcore.status import L1Status
from kvcore.storage.arena import Arena
from kvcore.storage.recovery import open_arena, recover
from kvcore.wire import wire_name

log = logging.getLogger(__name__)

SWITCH_S = 0.0005
"""Longest time that one thread holds the interpreter while another waits."""

MIN_BYTES_PER_CLIENT = 16 << 20
"""Least limit of the bytes of a client's unanswered requests."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Application:
    """One run of the server. `run` serves in the calling thread until `stop`."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.boot = BootToken(secrets.randbits(63) | 1)
        self._started = monotonic()
        with ExitStack() as stack:
            bound = stack.enter_context(bind(config.address, config.wire))
            self.address = bound.address
            arena = self.arena = open_arena(config.l1)
            stack.callback(arena.close)
            extensions = load_extensions()
            self.transports = _open_transports(config, extensions, arena)
            stack.callback(self.transports.close)
            recovered = None
            if config.l1.keep is not None:
                recovered = recover(Path(config.l1.keep), arena)
                stack.callback(recovered.journal.close)
            tiering = _open_tiering(config, extensions)
            self.engine = Engine(
                config,
                arena,
                open_tiering=tiering,
                recovered=recovered,
                transports=self.transports,
            )
            self._orphans = OrphanRemover(self.engine.run_after_close)
            if config.record is not None:
                recording = Recorder(Path(config.record), config.chunk_size)
                stack.callback(recording.close)
                self.engine.hooks.lookup.append(recording.add)
            self.clients = ClientTable(
                config.wire.heartbeat_s, self._watch, self._unwatch
            )
            self.loop = EventLoop(
                bound.socket,
                self.boot,
                self.clients,
                config.wire.max_requests_per_client,
                max(4 * int(config.wire.max_message), MIN_BYTES_PER_CLIENT),
            )
            stack.callback(self.loop.close)
            # Before the loop: copies that end wake it.
            stack.callback(self.engine.close)
            self.services = []
            for open_service in extensions.services:
                service = open_service(config, self.engine)
                stack.callback(service.close)
                self.services.append(service)
            stack.callback(self.clients.close)
            if config.metrics_port is not None:
                where = config.metrics_host, config.metrics_port
                stack.enter_context(
                    serve_metrics(*where, self.counters, self.l1_status)
                )
            self._stack = stack.pop_all()

    def run(self) -> None:
        """Serve until `stop` is called, then release everything."""
        try:
            config = self.config
            self.arena.keep()
            soonest = min(config.sessions.lease_s, config.wire.heartbeat_s)
            self.loop.serve(self._handlers(), self._client_gone, self._upkeep, soonest)
        finally:
            self.close()

    def stop(self) -> None:
        """Make `run` return. Any thread, and signal handlers."""
        self.loop.stop()

    def close(self) -> None:
        """Release memory, threads and socket. `run` does it; else the owner must."""
        self._stack.close()

    def _watch(self, fd: int) -> None:
        self.loop.watch(fd)

    def _unwatch(self, fd: int) -> None:
        self.loop.unwatch(fd)

    # -- requests -----------------------------------------------------------------

    def _handlers(self) -> dict[str, Handler]:
        """Return the handler of every request by its wire name."""
        served: dict[type[Request[Any]], ServiceHandler] = {**self.engine.handlers()}
        for service in self.services:
            served.update(service.handlers())
        handlers: dict[type[Request[Any]], Handler] = {
            Hello: self._hello,
            Goodbye: self._goodbye,
            Ping: self._ping,
            GetChunkSize: self._get_chunk_size,
            Status: self._status,
            **{kind: _with_context(kind, serve) for kind, serve in served.items()},
        }
        return {wire_name(kind): handler for kind, handler in handlers.items()}

    def _hello(self, request: Hello, client: Client, deadline_ns: int) -> HelloReply:
        if request.protocol_version != PROTOCOL_VERSION:
            self._forget(client)
            raise BadRequest(
                f"the client speaks protocol version {request.protocol_version}, "
                f"the server {PROTOCOL_VERSION}"
            )
        return HelloReply(
            protocol_version=PROTOCOL_VERSION,
            boot=self.boot,
            chunk_size=self.config.chunk_size,
            hash_algorithm=HASH_ALGORITHM,
            pid=os.getpid(),
            pid_start=start_time(os.getpid()) or 0,
            pid_namespace=pid_namespace(),
            watched=client.pidfd is not None,
            heartbeat_s=self.config.wire.heartbeat_s,
            max_message_bytes=int(self.config.wire.max_message),
            max_requests=self.config.wire.max_requests_per_client,
        )

    def _goodbye(self, request: Goodbye, client: Client, deadline_ns: int) -> Done:
        self._forget(client)
        return Done()

    def _forget(self, client: Client) -> None:
        self.loop.drop(client)
        self.engine.end_client(client.identity)

    def _ping(self, request: Ping, client: Client, deadline_ns: int) -> Pong:
        return Pong(monotonic_ns())

    def _get_chunk_size(
        self, request: GetChunkSize, client: Client, deadline_ns: int
    ) -> ChunkSize:
        return ChunkSize(self.config.chunk_size)

    def _status(self, request: Status, client: Client, deadline_ns: int) -> StatusReply:
        tiering = self.engine.tiering
        return StatusReply(
            version=__version__,
            address=self.address,
            pid=os.getpid(),
            boot=self.boot,
            chunk_size=self.config.chunk_size,
            uptime_s=monotonic() - self._started,
            num_clients=len(self.clients),
            num_sessions=len(self.engine.sessions),
            l1=self.l1_status(),
            instances=self.engine.instances(),
            leases=tuple(self.engine.leases.status(request.max_leases)),
            num_leases=len(self.engine.leases),
            tickets=tuple(
                ticket
                for service in self.services
                for ticket in service.tickets(request.max_leases)
            ),
            num_tickets=sum(service.num_tickets() for service in self.services),
            prefetches=tiering.prefetches(request.max_leases),
            num_prefetches=tiering.num_prefetches(),
            tiers=tiering.status(),
            devices=self.transports.devices(),
            quotas=self.engine.l1.quotas(),
            counters=self.counters(),
        )

    def l1_status(self) -> L1Status:
        """Return the use of the arena."""
        stats = self.engine.l1.stats()
        return L1Status(
            total_bytes=stats.total_bytes,
            used_bytes=stats.used_bytes,
            page_bytes=stats.page_bytes,
            num_chunks=stats.num_chunks,
            num_parts=stats.num_parts,
            num_leased=stats.num_held,
            num_reserved=stats.num_reserved,
        )

    def counters(self) -> dict[str, int]:
        """Return all counters since the start, by name."""
        stats = self.engine.l1.stats()
        return {
            "requests": self.loop.num_requests,
            "errors": self.loop.num_errors,
            "replies_lost": self.loop.num_replies_lost,
            **self.engine.counters.as_dict(),
            **{
                name: count
                for service in self.services
                for name, count in service.counters().items()
            },
            **self.engine.tiering.counters(),
            "chunks_evicted": stats.num_evicted,
            "chunks_corrupt": stats.num_corrupt,
            "leases_granted": self.engine.leases.num_granted,
            "pins_limited": self.engine.leases.limits.num_limited,
            **{
                f"leases_{reason.value}": count
                for reason, count in self.engine.leases.num_ended.items()
            },
        }

    # -- upkeep -------------------------------------------------------------------

    def _client_gone(self, client: Client) -> None:
        log.info("client %s (%s) is gone", client.pid, client.label)
        self.engine.end_client(client.identity)
        # The segments of a killed worker stay until they are removed. Not on this
        # thread: removal frees their memory, at 0.12 s per GiB.
        self._orphans.schedule()

    def _upkeep(self) -> float | None:
        self.loop.expire_silent()
        deadlines = (self.engine.expire(), self.clients.next_deadline())
        return min((d for d in deadlines if d is not None), default=None)


def _open_transports(
    config: ServerConfig, extensions: Extensions, arena: Arena
) -> TransportTable:
    others: dict[type[MemoryHandle], Transport] = {}
    for open_transports in extensions.transports:
        others.update(open_transports(config.device, arena.array))
    if config.device == "cuda" and CudaIpc not in others:
        raise SetupError("device = cuda: kvcore.cuda is not installed")
    return TransportTable(others, copy_threads=config.copy_threads)


def _open_tiering(config: ServerConfig, extensions: Extensions) -> OpenTiering:
    if not config.tiers:
        return no_tiering
    for open_tiers in extensions.tiers:
        return open_tiers(config.tiers, config)
    raise SetupError("tiers: kvcore.tiers is not installed")


def _with_context(kind: type[Request[Any]], serve: ServiceHandler) -> Handler:
    nested = _session_field(kind)

    def handler(request: Any, client: Client, deadline_ns: int) -> Any:
        context = RequestContext(
            client.identity,
            client.pid,
            deadline_ns,
            client.pidfd is not None,
            client.scope,
        )
        if nested == "session":
            request = _scoped(request, client.scope)
        elif nested:
            inner = _scoped(getattr(request, nested), client.scope)
            request = replace(request, **{nested: inner})
        return serve(request, context)

    return handler


def _session_field(kind: type[msgspec.Struct]) -> str | None:
    """Return "session", or the field of the nested request that names a session."""
    for field in msgspec.structs.fields(kind):
        named = getattr(field.type, "__struct_fields__", ())
        if field.name == "session" or "session" in named:
            return field.name
    return None


def _scoped(request: Any, scope: bytes) -> Any:
    """Limit the session that a request names to those of the client's scope."""
    key = request.session
    return replace(request, session=ScopedKey(key.engine_id, key.request_id, scope))


def remove_orphans() -> None:
    """Remove the shared-memory segments whose owners have ended."""
    for name in remove_dead(SEGMENT_PREFIX):
        log.info("removed %s, left behind by a dead process", name)


class OrphanRemover:
    """Removal of orphaned segments on another thread, once for many ended processes."""

    def __init__(self, submit: Callable[[Callable[[], None]], None]) -> None:
        self._submit = submit
        self._is_scheduled = False

    def schedule(self) -> None:
        """Remove the segments of processes that have ended by now, soon."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._submit(self._remove)

    def _remove(self) -> None:
        # First: the search may miss a process that ends meanwhile.
        self._is_scheduled = False
        remove_orphans()


def run(config: ServerConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `on_ready` gets the bound address.

    Raises:
        SetupError: the address is taken, or there is not enough memory.
    """
    remove_orphans()
    _raise_file_limit()
    server = Application(config)
    with _stopped_by_signals(server):
        _configure_gc()
        # A lane may hold the interpreter; a ping should not wait the default 5 ms.
        sys.setswitchinterval(SWITCH_S)
        try:
            on_ready(server.address)
        except BaseException:
            server.close()
            raise
        server.run()


def _raise_file_limit() -> None:
    """Allow as many open files as the process may have.

    Each connection, watched process and mapped segment takes one; the usual limit of
    1,024 is for programs that use `select`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _stopped_by_signals(server: Application) -> Iterator[None]:
    """Stop the server on the first SIGINT or SIGTERM; ignore later ones.

    Python runs handlers between bytecode instructions, so a signal just before the poll
    would be handled only after it. The wake-up descriptor is written at once and ends
    the poll.
    """

    def stop(*_: object) -> None:
        # Not SIG_IGN: Python warns about a signal that came just before that.
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        server.stop()

    watched, written = socketpair()
    with watched, written:
        written.setblocking(False)
        server.loop.watch(watched.fileno())
        signal.set_wakeup_fd(written.fileno())
        for number in STOP_SIGNALS:
            signal.signal(number, stop)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            # Interpreter shutdown restores the handlers; one more signal would kill.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _configure_gc() -> None:
    """Make full collections rare.

    One would visit up to a million chunks, for a second, and free nothing: the server's
    long-lived state has no cycles. Young generations stay enabled.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 1_000_000)
