"""A tier from its URL: `file:///var/kv?max=100GiB`, `valkey://host`, `s3://bucket`.

A new tier is a `Backend` in a file of its own and a line in `_OPENERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvcore.errors import SetupError
from kvcore.options import ByteSize
from kvcore.tiers.backend import Backend
from kvcore.tiers.thread_pool_tier import ThreadPoolTier
from kvcore.tiers.tier import Tier

ValueT = TypeVar("ValueT")


@dataclass
class Query:
    """The options of a URL: each is taken once, and what is left is unknown."""

    given: dict[str, str]
    known: list[str] = field(default_factory=list)

    def take(self, name: str, read: Callable[[str], ValueT]) -> ValueT | None:
        """Read an option; None when it is not given."""
        self.known.append(name)
        text = self.given.pop(name, None)
        if text is None:
            return None
        try:
            return read(text)
        except ValueError as error:
            raise SetupError(f"{name}={text}: {error}") from None

    def text(self, name: str) -> str | None:
        """Read an option as it stands."""
        return self.take(name, str)

    def flag(self, name: str) -> bool:
        """Read `true` or `false`, which is also the default."""
        return self.take(name, _flag) or False

    def seconds(self, name: str, default: float) -> float:
        """Read a time, more than 0."""
        seconds = self.take(name, float)
        if seconds is not None and not 0 < seconds < 1e6:
            raise SetupError(f"{name}={seconds}: seconds, more than 0")
        return seconds or default

    def end(self) -> None:
        """Raise `SetupError` when an option is left."""
        if self.given:
            names = ", ".join(sorted(self.given))
            raise SetupError(f"unknown option {names}; known: {', '.join(self.known)}")


@dataclass(frozen=True, slots=True)
class _OpenedTier:
    backend: Backend
    threads: int
    """Used unless the URL says otherwise."""


@dataclass(frozen=True, slots=True)
class _TierUrl:
    url: SplitResult
    query: Query
    timeout_s: float
    threads: int | None


def open_tier(url: str) -> Tier:
    """Open a tier; its store need not be there yet.

    Every URL may have `name=`, `timeout=` (seconds that a call may take, 5),
    `retry=` (seconds that a failed store is left alone, 1) and `threads=` (loads at
    once, and stores). The tier's own options stand with its
    opener below; one that is unknown is answered with those that are known.

    Raises:
        SetupError: naming the URL and what is wrong with it, or the extra to install.
    """
    shown = _without_secrets(url)
    try:
        return _open(url, shown)
    except SetupError as error:
        raise SetupError(f"tier {shown}: {error.message}") from None


def _open(url: str, shown: str) -> Tier:
    parts = _split(url)
    query = Query(dict(parse_qsl(parts.query, keep_blank_values=True)))
    name = query.text("name") or _name_of(parts)
    timeout_s = query.seconds("timeout", 5.0)
    retry_s = query.seconds("retry", 1.0)
    threads = query.take("threads", int)
    if threads is not None and not 1 <= threads <= 256:
        raise SetupError(f"threads={threads}: 1 to 256")
    opener = _OPENERS.get(parts.scheme)
    if opener is None:
        raise SetupError(f"no such kind; known: {', '.join(_OPENERS)}")
    opened = opener(_TierUrl(parts, query, timeout_s, threads))
    query.end()
    return ThreadPoolTier(
        name,
        shown,
        opened.backend,
        timeout_s=timeout_s,
        retry_s=retry_s,
        threads=threads or opened.threads,
    )


def _open_file(request: _TierUrl) -> _OpenedTier:
    from kvcore.tiers.file_backend import FileBackend

    url = request.url
    if url.netloc or not url.path.strip("/"):
        raise SetupError("must read file:///DIRECTORY")
    size = request.query.take("max", ByteSize.parse)
    max_bytes = None if size is None else int(size)
    return _OpenedTier(FileBackend(Path(unquote(url.path)), max_bytes), threads=4)


def _open_valkey(request: _TierUrl) -> _OpenedTier:
    from kvcore.tiers.resp import ServerAddress, TlsOptions
    from kvcore.tiers.valkey_backend import ValkeyBackend

    url, query = request.url, request.query
    unix = url.scheme.endswith("+unix")
    tls = None
    if url.scheme in ("valkeys", "rediss"):
        secured = TlsOptions(
            query.text("ca"),
            query.text("cert"),
            query.text("key"),
            verify=not query.flag("insecure"),
        )
        tls = secured.context()
    database = query.text("db") if unix else url.path.strip("/")
    target = ServerAddress(
        host=_host(url, unix),
        port=url.port or 6379,
        path=Path(unquote(url.path)) if unix else None,
        tls=tls,
        user=unquote(url.username) if url.username else None,
        password=None if url.password is None else unquote(url.password),
        db=_number(database or "0", "database"),
    )
    return _OpenedTier(ValkeyBackend(target, query.text("prefix") or ""), threads=4)


def _open_objects(request: _TierUrl) -> _OpenedTier:
    from kvcore.tiers.object_store_backend import ObjectsBackend

    url, query = request.url, request.query
    config, query.given = query.given, {}
    insecure = config.get("endpoint", "").startswith("http:")
    plain = url._replace(query="").geturl()
    if url.scheme == "memory":
        plain = "memory:///"
    backend = ObjectsBackend(
        plain, config, insecure=insecure, timeout_s=request.timeout_s
    )
    return _OpenedTier(backend, threads=8)


def _open_mooncake(request: _TierUrl) -> _OpenedTier:
    from kvcore.tiers.mooncake_backend import MooncakeBackend
    from kvcore.tiers.mooncake_process import Setup

    url, query = request.url, request.query
    setup = Setup(
        master=f"{_host(url, unix=False)}:{url.port or 50051}",
        local=query.text("local") or "127.0.0.1",
        metadata=query.text("metadata") or "P2PHANDSHAKE",
        protocol=query.text("protocol") or "tcp",
        device=query.text("device") or "",
        segment_bytes=int(query.take("segment", ByteSize.parse) or 0),
    )
    threads = request.threads or 2
    # Loads, stores and a question at once.
    backend = MooncakeBackend(setup, query.text("prefix") or "", 2 * threads + 1)
    return _OpenedTier(backend, threads)


_OPENERS: dict[str, Callable[[_TierUrl], _OpenedTier]] = {
    "file": _open_file,
    "valkey": _open_valkey,
    "valkeys": _open_valkey,
    "valkey+unix": _open_valkey,
    "redis": _open_valkey,
    "rediss": _open_valkey,
    "redis+unix": _open_valkey,
    "s3": _open_objects,
    "gs": _open_objects,
    "az": _open_objects,
    "memory": _open_objects,
    "mooncake": _open_mooncake,
}


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SetupError(str(error)) from None
    if not parts.scheme or parts.fragment:
        raise SetupError("must read KIND://PLACE?OPTION=VALUE&...")
    return parts


def _host(url: SplitResult, unix: bool) -> str:
    if unix and not url.path.strip("/"):
        raise SetupError(f"must read {url.scheme}:///PATH")
    if not unix and not url.hostname:
        raise SetupError(f"must read {url.scheme}://HOST:PORT")
    return url.hostname or ""


def _name_of(url: SplitResult) -> str:
    """Name a tier by its kind and place: `valkey-10.0.0.1-6379`."""
    place = url.netloc.rpartition("@")[2] + url.path
    words = "".join(c if c.isalnum() or c == "." else " " for c in place).split()
    return "-".join([url.scheme.partition("+")[0], *words])


def _without_secrets(url: str) -> str:
    """Leave of the query what is no credential, and of the user only the name."""
    start, _, query = url.partition("?")
    kind, slashes, place = start.partition("://")
    login, at, host = place.rpartition("@")
    user = login.partition(":")[0]
    shown = [
        item
        for item in query.split("&")
        if item and not any(word in item.lower() for word in _SECRETS)
    ]
    question = "?" if shown else ""
    return f"{kind}{slashes}{user}{at}{host}{question}{'&'.join(shown)}"


_SECRETS = (
    "secret",
    "token",
    "password",
    "access_key",
    "account_key",
    "sas",
    "service",
)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _number(text: str, what: str) -> int:
    if not text.isdecimal():
        raise SetupError(f"{text!r} is no number of a {what}")
    return int(text)
