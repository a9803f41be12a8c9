"""Reuse of documents at any position of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcore.config import ServerConfig
    from kvcore.engine.extension_interface import ExtensionInterface
    from kvcore.extensions import Extensions, RequestService


def register(extensions: Extensions) -> None:
    """Register the blend requests; their error names `--engine blend` if it is off."""
    extensions.services.append(_open)


def _open(config: ServerConfig, engine: ExtensionInterface) -> RequestService:
    from kvcore.blend.blend_engine import BlendDisabled, BlendEngine

    return BlendEngine(config, engine) if config.engine == "blend" else BlendDisabled()
