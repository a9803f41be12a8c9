"""Registry of the optional parts: GPU memory, tiers, worker-driven copies, blend.

The core imports none of them. Each package of `PACKAGES` has a function `register` in
its `__init__`, which enters what it offers here and imports nothing heavy until that is
opened. A package that is not installed offers nothing.
"""

from __future__ import annotations

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
"""Takes a request and its context; as `kvcore.engine.engine` describes handlers."""


class RequestService(Protocol):
    """Requests that an optional part serves. Loop thread only."""

    def handlers(self) -> Mapping[type[Request[Any]], ServiceHandler]:
        """Return the handler of each request type that it serves."""

    def counters(self) -> dict[str, int]:
        """Return its counters by name; each only grows."""

    def tickets(self, limit: int) -> tuple[TicketStatus, ...]:
        """Describe the `limit` oldest tickets."""

    def num_tickets(self) -> int:
        """Return the number of live tickets."""

    def close(self) -> None:
        """Release what it holds, before the engine is closed."""


OpenTransports = Callable[[str, Bytes], Mapping[type[MemoryHandle], Transport]]
"""Makes the transports of a `device` option, of the option and the arena."""
OpenService = Callable[[ServerConfig, Engine], RequestService]
OpenTiers = Callable[[Sequence[str], ServerConfig], OpenTiering]
"""Opens tiers by URL; returns what makes them the engine's tiering."""


@dataclass(slots=True)
class Extensions:
    """What the installed optional parts offer."""

    transports: list[OpenTransports] = field(default_factory=list)
    tiers: list[OpenTiers] = field(default_factory=list)
    services: list[OpenService] = field(default_factory=list)


@cache
def load_extensions() -> Extensions:
    """Import the installed packages of `PACKAGES` and return what they offer."""
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
