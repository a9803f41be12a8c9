"""KV-cache server for LLM inference: its client, and descriptions of caches.

The names of `__all__` are the public API; docs/library.md explains them. They are
imported on first use, so that `import kvcore` is cheap. Modules of the package are
internal unless docs/library.md names them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcore.blend.blend_client import BlendClient
    from kvcore.client.client import KVClient
    from kvcore.config import ServerConfig
    from kvcore.errors import (
        BadRequest,
        ChunksMissing,
        Closed,
        DeadlineExceeded,
        DeviceFailed,
        HandleError,
        InstanceExists,
        Internal,
        KVError,
        LayoutConflict,
        LayoutError,
        Overloaded,
        RequestError,
        RequestMismatch,
        ServerError,
        SetupError,
        StaleBoot,
        StateError,
        TokensNeeded,
        TooLarge,
        Unavailable,
        UnknownInstance,
        UnknownModel,
        UnknownRequest,
        UnknownTicket,
    )
    from kvcore.keys import ExtraKey, SessionKey
    from kvcore.layout import CacheGroup, TensorView, token_buffer
    from kvcore.protocol import (
        CBRegisterKVCache,
        CudaIpc,
        LookupReply,
        PosixShm,
        Private,
        RegisterKVCache,
        RetrieveReply,
        StatusReply,
        StoreReply,
    )
    from kvcore.rope import Rope
    from kvcore.server.application import run as run_server
    from kvcore.shm import Segment
    from kvcore.storage.eviction import EvictionPolicy, register_policy
    from kvcore.tiers.tier_url import register_tier
    from kvcore.worker.copying_client import CopyingClient

__version__ = "0.2.0"

__all__ = [
    "BadRequest",
    "BlendClient",
    "CBRegisterKVCache",
    "CacheGroup",
    "ChunksMissing",
    "Closed",
    "CopyingClient",
    "CudaIpc",
    "DeadlineExceeded",
    "DeviceFailed",
    "EvictionPolicy",
    "ExtraKey",
    "HandleError",
    "InstanceExists",
    "Internal",
    "KVClient",
    "KVError",
    "LayoutConflict",
    "LayoutError",
    "LookupReply",
    "Overloaded",
    "PosixShm",
    "Private",
    "RegisterKVCache",
    "RequestError",
    "RequestMismatch",
    "RetrieveReply",
    "Rope",
    "Segment",
    "ServerConfig",
    "ServerError",
    "SessionKey",
    "SetupError",
    "StaleBoot",
    "StateError",
    "StatusReply",
    "StoreReply",
    "TensorView",
    "TokensNeeded",
    "TooLarge",
    "Unavailable",
    "UnknownInstance",
    "UnknownModel",
    "UnknownRequest",
    "UnknownTicket",
    "__version__",
    "register_policy",
    "register_tier",
    "run_server",
    "token_buffer",
]

_MODULES = {
    "kvcore.blend.blend_client": ("BlendClient",),
    "kvcore.client.client": ("KVClient",),
    "kvcore.config": ("ServerConfig",),
    "kvcore.keys": ("ExtraKey", "SessionKey"),
    "kvcore.layout": ("CacheGroup", "TensorView", "token_buffer"),
    "kvcore.protocol": (
        "CBRegisterKVCache", "CudaIpc", "LookupReply", "PosixShm", "Private",
        "RegisterKVCache", "RetrieveReply", "StatusReply", "StoreReply",
    ),
    "kvcore.rope": ("Rope",),
    "kvcore.shm": ("Segment",),
    "kvcore.storage.eviction": ("EvictionPolicy", "register_policy"),
    "kvcore.tiers.tier_url": ("register_tier",),
    "kvcore.worker.copying_client": ("CopyingClient",),
}  # fmt: skip
"""Public names by module; those of `kvcore.errors` are left out."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "run_server":
        from kvcore.server.application import run

        found: Any = run
    elif name in __all__:
        owners = (module for module, names in _MODULES.items() if name in names)
        found = vars(import_module(next(owners, "kvcore.errors")))[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
