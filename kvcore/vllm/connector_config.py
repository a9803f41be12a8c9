"""What a vLLM user can set: `kv_connector_extra_config` of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvcore.config import ServerConfig, is_address
from kvcore.errors import SetupError
from kvcore.options import Options, require


class ConnectorConfig(Options, frozen=True):
    """Where the server is and how long vLLM waits for it."""

    address: Annotated[str, Meta(description="the server's address")] = (
        ServerConfig().address
    )
    driver: Annotated[
        Literal["server", "worker"],
        Meta(description="who copies: worker needs no cache in shared memory"),
    ] = "server"
    lookup_timeout_s: Annotated[
        float, Meta(description="a prompt waits so long for its lookup, then computes")
    ] = 2.0
    store_timeout_s: Annotated[
        float, Meta(description="blocks are held so long for a store, then given back")
    ] = 5.0
    load_timeout_s: Annotated[
        float,
        Meta(description="a load begins by then or fails, and is computed"),
    ] = 10.0
    retry_s: Annotated[
        float, Meta(description="a server that does not answer is tried again after")
    ] = 1.0
    model: Annotated[
        str, Meta(description="identity of the model; empty: derived from the engine's")
    ] = ""

    def check(self) -> None:
        """The address can be connected to, and every time is positive."""
        require(
            is_address(self.address),
            "address", self.address, "must be tcp://HOST:PORT or ipc://PATH",
        )  # fmt: skip
        for key in (
            "lookup_timeout_s", "store_timeout_s", "load_timeout_s", "retry_s"
        ):  # fmt: skip
            require(getattr(self, key) > 0, key, getattr(self, key), "more than 0")


def parse_config(extra: Mapping[str, object]) -> ConnectorConfig:
    """Read `kv_connector_extra_config`; `SetupError` names the key."""
    try:
        return msgspec.convert(dict(extra), ConnectorConfig)
    except (msgspec.ValidationError, SetupError) as error:
        raise SetupError(f"kv_connector_extra_config: {error}") from None
