"""Connector options, read from vLLM's `kv_connector_extra_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvcore.config import ServerConfig, is_address
from kvcore.errors import SetupError
from kvcore.option_structs import Options, require

Seconds = Annotated[float, Meta(gt=0)]


class ConnectorConfig(Options, frozen=True):
    """Server address, timeouts, and which process copies."""

    address: str = ServerConfig().address
    """The server's address, on this host."""
    driver: Literal["server", "worker"] = "server"
    """Which process copies; with `worker` the cache needs no shared memory."""
    lookup_timeout_s: Seconds = 2.0
    """Longest wait for a lookup; then the prompt is computed."""
    store_timeout_s: Seconds = 5.0
    """Longest time that blocks are held for a store."""
    load_timeout_s: Seconds = 10.0
    """A load that has not started by then fails and is recomputed."""
    retry_s: Seconds = 1.0
    """Interval between attempts to reach the server."""
    model: str = ""
    """Identity of the model; empty: derived from the engine's configuration."""

    def check(self) -> None:
        """Check that the address is valid."""
        require(
            is_address(self.address),
            "address", self.address, "must be tcp://HOST:PORT or ipc://PATH",
        )  # fmt: skip


def parse_config(extra: Mapping[str, object]) -> ConnectorConfig:
    """Parse `kv_connector_extra_config`.

    Raises:
        SetupError: an option is unknown or invalid; the message names it.
    """
    try:
        return msgspec.convert(dict(extra), ConnectorConfig)
    except (msgspec.ValidationError, SetupError) as error:
        raise SetupError(f"kv_connector_extra_config: {error}") from None
