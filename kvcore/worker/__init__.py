"""Workers that copy their own caches: client, mapped arena, server-side tickets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcore.config import ServerConfig
    from kvcore.engine.engine import Engine
    from kvcore.extensions import Extensions, RequestService


def register(extensions: Extensions) -> None:
    """Register the ticket service."""
    extensions.services.append(_open)


def _open(config: ServerConfig, engine: Engine) -> RequestService:
    from kvcore.worker.ticket_service import TicketService

    return TicketService(engine, config.wire.max_requests_per_client)
