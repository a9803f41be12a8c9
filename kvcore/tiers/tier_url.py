"""A tier from its URL: `file:///var/kv?max=100GiB`, `valkey://host`, `s3://bucket`.

Each backend's module declares its options as a Struct and registers its schemes here;
modules of built-in backends are imported when a URL first names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

import msgspec

from kvcore.errors import SetupError
from kvcore.option_structs import Options, decode_hook, require, type_name
from kvcore.tiers.thread_pool_tier import ThreadPoolTier
from kvcore.tiers.tier import Backend, Tier


class TierOptions(Options, frozen=True):
    """Options of every tier's URL; a backend adds its own in a subclass.

    A field `other` of type `dict[str, str]` receives the options that are not declared;
    without it they are refused.
    """

    name: str = ""
    """From the scheme and the place if empty."""
    timeout: float = 5.0
    """Seconds that a call may take."""
    retry: float = 1.0
    """Seconds of the first back-off after a failure."""
    threads: int = 4
    """For loads, and as many for stores."""

    def check(self) -> None:
        """Check the ranges."""
        for key, seconds in (("timeout", self.timeout), ("retry", self.retry)):
            require(0 < seconds < 1e6, key, seconds, "seconds, more than 0")
        require(1 <= self.threads <= 256, "threads", self.threads, "1 to 256")


OptionsT = TypeVar("OptionsT", bound=TierOptions)
BackendOpener = Callable[[SplitResult, OptionsT], Backend]
"""Makes a backend from a URL and its decoded options. Raises `SetupError`."""


_KINDS: dict[str, tuple[BackendOpener[Any], type[Any]]] = {}
"""Opener and options of every registered scheme."""
_VALKEY = ("valkey", "valkeys", "valkey+unix", "redis", "rediss", "redis+unix")
_MODULES = {
    "file": "file_backend",
    **dict.fromkeys(_VALKEY, "valkey_backend"),
    **dict.fromkeys(("s3", "gs", "az"), "object_store_backend"),
    "mooncake": "mooncake_backend",
}
"""Modules that register the built-in schemes."""


def register_tier(
    scheme: str, open_backend: BackendOpener[OptionsT], options: type[OptionsT]
) -> None:
    """Have `open_tier` open URLs of `scheme` with `open_backend`.

    `options` is `TierOptions` or a subclass: what the URL's query is decoded to.
    """
    _KINDS[scheme] = open_backend, options


def open_tier(url: str) -> Tier:
    """Open a tier; its store need not be reachable yet.

    Raises:
        SetupError: naming the URL and what is wrong with it, or the extra to install.
    """
    shown = _without_secrets(url)
    try:
        parts = _split(url)
        if parts.scheme not in _KINDS and parts.scheme in _MODULES:
            import_module(f"kvcore.tiers.{_MODULES[parts.scheme]}")
        if parts.scheme not in _KINDS:
            known = ", ".join(dict.fromkeys([*_MODULES, *_KINDS]))
            raise SetupError(f"no such kind; known: {known}")
        open_backend, kind = _KINDS[parts.scheme]
        options = _decode(kind, dict(parse_qsl(parts.query, keep_blank_values=True)))
        return ThreadPoolTier(
            options.name or _name_of(parts),
            shown,
            open_backend(parts, options),
            timeout_s=options.timeout,
            retry_s=options.retry,
            threads=options.threads,
        )
    except SetupError as error:
        raise SetupError(f"tier {shown}: {error.message}") from None


def host_of(url: SplitResult) -> str:
    """Return the host of a URL.

    Raises:
        SetupError: it has none.
    """
    if not url.hostname:
        raise SetupError(f"must read {url.scheme}://HOST:PORT")
    return url.hostname


def _decode(kind: type[OptionsT], query: Mapping[str, str]) -> OptionsT:
    fields = {field.name: field for field in msgspec.inspect.type_info(kind).fields}  # type: ignore[attr-defined]
    values: dict[str, object] = {k: v for k, v in query.items() if k in fields}
    unknown = {k: v for k, v in query.items() if k not in fields}
    if "other" in fields:
        values["other"] = unknown
    elif unknown:
        names = ", ".join(sorted(unknown))
        raise SetupError(f"unknown option {names}; known: {', '.join(fields)}")
    try:
        return msgspec.convert(values, kind, strict=False, dec_hook=decode_hook)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$.")
        key = where.removesuffix("`")
        need = type_name(fields[key].type)
        raise SetupError(f"{key}={query[key]}: {message} ({need})") from None


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SetupError(str(error)) from None
    if not parts.scheme or parts.fragment:
        raise SetupError("must read KIND://PLACE?OPTION=VALUE&...")
    return parts


def _name_of(url: SplitResult) -> str:
    """Name a tier by its scheme and place: `valkey-10.0.0.1-6379`."""
    place = url.netloc.rpartition("@")[2] + url.path
    words = "".join(c if c.isalnum() or c == "." else " " for c in place).split()
    return "-".join([url.scheme.partition("+")[0], *words])


def _without_secrets(url: str) -> str:
    """Remove the password and every query option that may be a credential."""
    start, _, query = url.partition("?")
    kind, slashes, place = start.partition("://")
    login, at, host = place.rpartition("@")
    user = login.partition(":")[0]
    shown = [item for item in query.split("&") if item and not _SECRETS.search(item)]
    question = "?" if shown else ""
    return f"{kind}{slashes}{user}{at}{host}{question}{'&'.join(shown)}"


_SECRETS = re.compile(
    "secret|token|password|access_key|account_key|sas|service", re.IGNORECASE
)
