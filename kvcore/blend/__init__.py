"""Reuse of documents at any position of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcore.config import ServerConfig
    from kvcore.engine.engine import Engine
    from kvcore.extensions import Extensions, RequestService


def register(extensions: Extensions) -> None:
    """Offer the requests of `--engine blend`; without it they are refused by name."""
    extensions.services.append(_open)


def _open(config: ServerConfig, engine: Engine) -> RequestService:
    if config.engine == "blend":
        from kvcore.blend.blend_engine import BlendEngine

        return BlendEngine(config, engine)
    from kvcore.blend.blend_disabled import BlendDisabled

    return BlendDisabled()
