"""The blend requests, served by a prefix engine and an index of documents."""

from __future__ import annotations

from typing import Any, NoReturn

from kvcore.config import BlendConfig
from kvcore.engine.engine import Caller, Engine
from kvcore.errors import UnknownRequest
from kvcore.protocol import wire_name


class NoBlend:
    """Answers the blend requests of a server that was started without them."""

    def refuse(self, request: Any, caller: Caller) -> NoReturn:
        """Say what to start the server with."""
        del caller
        raise UnknownRequest(
            f"{wire_name(type(request))}: this server serves prefixes only; start it "
            "with --engine blend"
        )

    cb_register_kv_cache = cb_unregister_kv_cache = refuse
    cb_store_pre_computed = cb_lookup_pre_computed = refuse
    cb_retrieve_pre_computed = cb_store_final = refuse


class BlendEngine(NoBlend):
    def __init__(self, config: BlendConfig, engine: Engine) -> None: ...
    def counts(self) -> dict[str, int]:
        return {}
