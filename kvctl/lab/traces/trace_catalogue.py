"""Catalogue of public traces with licence and sha256, and their download."""

from __future__ import annotations

import hashlib
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO

import msgspec

from kvcore.errors import SetupError

READ_BYTES = 1 << 20
TIMEOUT_S = 30.0


class PublicTrace(msgspec.Struct, frozen=True):
    """One file; size and sha256 are those published, None if unknown."""

    name: str
    format: str
    url: str
    source: str
    licence: str
    about: str
    num_bytes: int | None = None
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        """Name of a downloaded copy."""
        return f"{self.name}{Path(self.url).suffix}"


CATALOGUE = msgspec.convert(
    tomllib.loads(files(__package__).joinpath("public_traces.toml").read_text())[
        "trace"
    ],
    tuple[PublicTrace, ...],
)


Fetcher = Callable[[str], BinaryIO]
"""Opens a URL, or raises `OSError`; replaced in tests."""


def find(name: str) -> list[PublicTrace]:
    """Return the trace of that name, or all with that prefix.

    Raises:
        SetupError: no trace matches.
    """
    found = [one for one in CATALOGUE if one.name == name]
    found = found or [one for one in CATALOGUE if one.name.startswith(name)]
    if not found:
        names = ", ".join(one.name for one in CATALOGUE)
        raise SetupError(f"no trace {name!r}; known are {names}")
    return found


def open_url(url: str) -> BinaryIO:
    """Open a URL over the network."""
    opened: BinaryIO = urllib.request.urlopen(url, timeout=TIMEOUT_S)
    return opened


def fetch(trace: PublicTrace, folder: Path, fetcher: Fetcher = open_url) -> Path:
    """Download a trace into a folder unless it has a correct copy; return its path.

    A file with another sha256 is deleted.

    Raises:
        SetupError: the download or the write failed, or the sha256 differs.
    """
    path = folder / trace.file_name
    if path.exists() and trace.sha256 == sha256_of(path):
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with fetcher(trace.url) as source, part.open("wb") as target:
            while data := source.read(READ_BYTES):
                target.write(data)
            if getattr(source, "length", None):
                raise OSError("the file ended early")
        _check(trace, part)
        return part.replace(path)
    except (OSError, urllib.error.URLError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "reason", None) or error
        raise SetupError(f"{trace.name}: {trace.url}: {reason}") from None


def _check(trace: PublicTrace, path: Path) -> None:
    found = sha256_of(path)
    if trace.sha256 is not None and found != trace.sha256:
        size = path.stat().st_size
        path.unlink()
        raise SetupError(
            f"{trace.name}: {trace.url} has changed: {size} bytes with sha256 "
            f"{found}, expected {trace.num_bytes} with {trace.sha256}"
        )


def sha256_of(path: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
