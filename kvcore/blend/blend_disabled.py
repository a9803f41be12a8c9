"""What a server without documents answers to those who ask for them."""

from __future__ import annotations

from typing import Any, NoReturn

from kvcore.engine.request_context import RequestContext
from kvcore.errors import UnknownRequest
from kvcore.wire import wire_name


class BlendDisabled:
    """Refuses every blend request."""

    def refuse(self, request: Any, caller: RequestContext) -> NoReturn:
        """Say what to start the server with."""
        del caller
        raise UnknownRequest(
            f"{wire_name(type(request))}: this server serves prefixes only; start it "
            "with --engine blend"
        )

    cb_register_kv_cache = cb_unregister_kv_cache = refuse
    cb_store_pre_computed = cb_lookup_pre_computed = refuse
    cb_retrieve_pre_computed = cb_store_final = refuse
