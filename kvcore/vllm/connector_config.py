"""Connector options, read from vLLM's `kv_connector_extra_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvcore.config import ServerConfig, is_address
from kvcore.errors import SetupError
from kvcore.option_structs import Options, require


class ConnectorConfig(Options, frozen=True):
    """Server address, timeouts, and which process copies."""

    address: Annotated[str, Meta(description="the server's address")] = (
        ServerConfig().address
    )
    driver: Annotated[
        Literal["server", "worker"],
        Meta(
            description="which process copies; worker needs no cache in shared memory"
        ),
    ] = "server"
    lookup_timeout_s: Annotated[
        float,
        Meta(description="longest wait for a lookup; then the prompt is computed"),
    ] = 2.0
    store_timeout_s: Annotated[
        float, Meta(description="longest time that blocks are held for a store")
    ] = 5.0
    load_timeout_s: Annotated[
        float,
        Meta(description="a load not started by then fails and is recomputed"),
    ] = 10.0
    retry_s: Annotated[
        float, Meta(description="interval between attempts to reach the server")
    ] = 1.0
    model: Annotated[
        str, Meta(description="identity of the model; empty: derived from the engine's")
    ] = ""

    def check(self) -> None:
        """Check that the address is valid and that every time is positive."""
        require(
            is_address(self.address),
            "address", self.address, "must be tcp://HOST:PORT or ipc://PATH",
        )  # fmt: skip
        for key in (
            "lookup_timeout_s", "store_timeout_s", "load_timeout_s", "retry_s"
        ):  # fmt: skip
            require(getattr(self, key) > 0, key, getattr(self, key), "more than 0")


def parse_config(extra: Mapping[str, object]) -> ConnectorConfig:
    """Parse `kv_connector_extra_config`.

    Raises:
        SetupError: an option is unknown or invalid; the message names it.
    """
    try:
        return msgspec.convert(dict(extra), ConnectorConfig)
    except (msgspec.ValidationError, SetupError) as error:
        raise SetupError(f"kv_connector_extra_config: {error}") from None
