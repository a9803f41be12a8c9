"""Reuse of documents at any position of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcore.config import ServerConfig
    from kvcore.engine.extension_interface import ExtensionInterface
    from kvcore.extensions import Extensions, RequestService


def register(extensions: Extensions) -> None:
    """Offer the blend requests; without `--engine blend` they are refused by name."""
    extensions.services.append(_open)


def _open(config: ServerConfig, engine: ExtensionInterface) -> RequestService:
    from kvcore.blend.blend_engine import BlendDisabled, BlendEngine

    return BlendEngine(config, engine) if config.engine == "blend" else BlendDisabled()
