"""Connection to a server that may be absent, slow, stopped or replaced.

A server is available until a request fails with one of `SERVER_ERRORS`, and again as
soon as it answers a ping. While it is unavailable no requests are sent, and the engine
works as if it had no cache. A background thread connects and reconnects; no other
thread waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from threading import Event, Thread

from kvcore.client import KVClient
from kvcore.errors import (
    DeadlineExceeded,
    KVError,
    RequestError,
    RequestMismatch,
    StaleBoot,
    Unavailable,
    UnknownInstance,
    UnknownRequest,
)
from kvcore.protocol import Ping
from kvcore.vllm.connector_config import ConnectorConfig

log = logging.getLogger(__name__)

PROBE_S = 2.0
"""Timeout of a ping."""
REGISTER_S = 30.0
MAX_PAUSE_S = 30.0

SERVER_ERRORS = (
    DeadlineExceeded, RequestMismatch, StaleBoot, Unavailable, UnknownInstance,
    UnknownRequest,
)  # fmt: skip
"""Errors after which no requests are sent until the server answers a ping."""


@dataclass(frozen=True, slots=True)
class ServerEndpoint:
    """An available server and its chunk size in tokens."""

    client: KVClient
    chunk_size: int


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Name of an engine on the server, and the key that its processes share.

    Both are digests of vLLM's engine id: random unless the user sets one, equal in all
    processes of an engine, and never sent. The name, which the server shows, does not
    give away the key.
    """

    id: str
    key: bytes

    @classmethod
    def derive(cls, engine_id: str) -> EngineIdentity:
        """Derive both from vLLM's engine id."""
        name = sha256(b"name" + engine_id.encode()).hexdigest()[:16]
        return cls(name, sha256(b"key" + engine_id.encode()).digest())


class ServerLink:
    """Connection of one process of an engine, used by one of its threads.

    `role` names the process on the server. `on_available` is called on the background
    thread each time the server becomes available, and may block; a `KVError` from it
    means that the server is unavailable.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        engine: EngineIdentity,
        role: str,
        on_available: Callable[[KVClient], object] | None = None,
        make_client: type[KVClient] = KVClient,
    ) -> None:
        self._address = config.address
        self._retry_s = config.retry_s
        self._label = f"{engine.id} {role}"
        self._engine_key = engine.key
        self._on_available = on_available
        self._make_client = make_client
        self.last_client: KVClient | None = None
        """The client, even if the server is unavailable, for cleanup requests."""
        self._is_down = Event()
        self._is_down.set()
        self._closed = Event()
        self._warned = False
        self._num_late = 0
        self._logged_codes: set[str] = set()
        self._thread = Thread(target=self._watch, name=f"link {role}", daemon=True)
        self._thread.start()

    @property
    def server(self) -> ServerEndpoint | None:
        """The server, or None while it is unavailable."""
        client = self.last_client
        if client is None or self._is_down.is_set():
            return None
        try:
            return ServerEndpoint(client, client.chunk_size)
        except Unavailable as error:
            self.record_failure(error)
            return None

    def record_success(self) -> None:
        """Record a reply in time: reset the back-off."""
        self._num_late = 0

    def record_failure(self, error: BaseException) -> None:
        """Record a request's error: mark the server unavailable, or log it once."""
        if self._closed.is_set():
            return
        if isinstance(error, SERVER_ERRORS):
            self._num_late += isinstance(error, DeadlineExceeded)
            self._is_down.set()
            self._warn(error)
            return
        code = getattr(error, "code", type(error).__name__)
        if code not in self._logged_codes:
            self._logged_codes.add(code)
            log.warning("a request to the cache server failed: %s", error)

    def close(self) -> None:
        """Close the connection; waits at most `PROBE_S` + 1 seconds for the thread."""
        self._closed.set()
        self._is_down.set()
        self._thread.join(PROBE_S + 1)
        if self.last_client is not None and not self._thread.is_alive():
            self.last_client.close()

    # -- background thread -----------------------------------------------------------

    def _watch(self) -> None:
        while True:
            self._is_down.wait()
            pause_s = 0.0
            if self._num_late:  # Exponential back-off by missed deadlines.
                pause_s = min(self._retry_s * 2**self._num_late, MAX_PAUSE_S)
            while not self._closed.wait(pause_s):
                error = self._try()
                if error is None:
                    break
                pause_s = self._retry_s
                if isinstance(error, RequestError):  # The server refused.
                    pause_s = max(pause_s, MAX_PAUSE_S / 3)
            else:
                return

    def _try(self) -> KVError | None:
        """Connect to the server or ping it; return the error, if any."""
        try:
            client = self.last_client
            if client is None:
                client = self._make_client(
                    self._address,
                    label=self._label,
                    timeout_s=PROBE_S,
                    engine_key=self._engine_key,
                )
                client.timeout_s = REGISTER_S
                self.last_client = client
            else:
                client.call(Ping(), PROBE_S)
            if self._on_available is not None:
                self._on_available(client)
        except KVError as error:
            self._warn(error)
            return error
        self._is_down.clear()
        if self._warned:
            log.warning("the cache server at %s is back", self._address)
            self._warned = False
        return None

    def _warn(self, error: BaseException) -> None:
        """Log one warning until the server is available again."""
        if not self._warned and not self._closed.is_set():
            self._warned = True
            log.warning(
                "no KV cache for now: %s; %s is tried again from time to time",
                error,
                self._address,
            )
