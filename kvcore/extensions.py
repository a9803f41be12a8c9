"""Registry of the optional parts: GPU memory, tiers, worker-driven copies, blend.

The core imports none of them. Each package of `PACKAGES` has a function `register` in
its `__init__`, which adds its factories to `Extensions`; heavy imports wait until a
factory is called. Packages that are not installed are skipped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import msgspec

from kvcore.config import ServerConfig
from kvcore.copy.memory_transports import Transport
from kvcore.engine.engine import Engine
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.engine.tiering import OpenTiering
from kvcore.protocol import MemoryHandle, Request
from kvcore.shm import Bytes
from kvcore.status import TicketStatus

PACKAGES = ("kvcore.cuda", "kvcore.tiers", "kvcore.worker", "kvcore.blend")

Result = msgspec.Struct | DeferredReply
ServiceHandler = Callable[[Any, RequestContext], Result | Generator[None, None, Result]]
"""Takes a request and its context; see `kvcore.engine.engine` for handlers."""


class RequestService(Protocol):
    """Requests that an optional part serves. Called on the loop thread only."""

    @abstractmethod
    def handlers(self) -> Mapping[type[Request[Any]], ServiceHandler]:
        """Return the handlers by request type."""

    def counters(self) -> dict[str, int]:
        """Return monotonic counters by name."""
        return {}

    def tickets(self, limit: int) -> tuple[TicketStatus, ...]:
        """Return the `limit` oldest tickets, oldest first."""
        del limit
        return ()

    def num_tickets(self) -> int:
        """Return the number of live tickets."""
        return 0

    def close(self) -> None:
        """Release all resources; called before the engine is closed."""
        return


OpenTransports = Callable[[str, Bytes], Mapping[type[MemoryHandle], Transport]]
"""Takes the `device` option and the arena; returns transports by handle type."""
OpenService = Callable[[ServerConfig, Engine], RequestService]
OpenTiers = Callable[[Sequence[str], ServerConfig], OpenTiering]
"""Takes URLs; returns a factory of the engine's tiering."""


@dataclass(slots=True)
class Extensions:
    """Factories of the installed optional parts."""

    transports: list[OpenTransports] = field(default_factory=list)
    tiers: list[OpenTiers] = field(default_factory=list)
    services: list[OpenService] = field(default_factory=list)


@cache
def load_extensions() -> Extensions:
    """Import the installed packages of `PACKAGES` and return their factories."""
    extensions = Extensions()
    for name in PACKAGES:
        try:
            package = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue
        package.register(extensions)
    return extensions
