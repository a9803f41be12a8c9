"""Tiers behind L1: the contract, the stores, prefetch and write-back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcore.config import ServerConfig
    from kvcore.engine.tiering import OpenTiering
    from kvcore.extensions import Extensions


def register(extensions: Extensions) -> None:
    """Offer the tiers of `--tier URL`."""
    extensions.tiers.append(_open)


def _open(urls: Sequence[str], config: ServerConfig) -> OpenTiering:
    from kvcore.tiers.tier_manager import open_tiering

    return open_tiering(urls, config)
