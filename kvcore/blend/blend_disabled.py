"""Answers of a server without `--engine blend` to blend requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from kvcore.engine.request_context import RequestContext
from kvcore.errors import UnknownRequest
from kvcore.extensions import ServiceHandler
from kvcore.protocol import (
    CBLookupPreComputed,
    CBRegisterKVCache,
    CBRetrievePreComputed,
    CBStoreFinal,
    CBStorePreComputed,
    CBUnregisterKVCache,
    Request,
)
from kvcore.status import TicketStatus
from kvcore.wire import wire_name

BLEND_REQUESTS: tuple[type[Request[Any]], ...] = (
    CBRegisterKVCache,
    CBUnregisterKVCache,
    CBStorePreComputed,
    CBStoreFinal,
    CBLookupPreComputed,
    CBRetrievePreComputed,
)


class BlendDisabled:
    """Refuses every blend request; see `kvcore.extensions.RequestService`."""

    def handlers(self) -> Mapping[type[Request[Any]], ServiceHandler]:
        """Return one handler for all of them, which raises `UnknownRequest`."""
        return dict.fromkeys(BLEND_REQUESTS, _refuse)

    def counters(self) -> dict[str, int]:
        """Return none."""
        return {}

    def tickets(self, limit: int) -> tuple[TicketStatus, ...]:
        """Return none."""
        del limit
        return ()

    def num_tickets(self) -> int:
        """Return 0."""
        return 0

    def close(self) -> None:
        """Do nothing."""


def _refuse(request: Request[Any], context: RequestContext) -> NoReturn:
    del context
    raise UnknownRequest(
        f"{wire_name(type(request))}: this server serves prefixes only; start it "
        "with --engine blend"
    )
