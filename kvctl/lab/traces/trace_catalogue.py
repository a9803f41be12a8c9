"""Public traces: where they are, under what licence, and how to check a copy."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from kvcore.errors import SetupError

READ_BYTES = 1 << 20
TIMEOUT_S = 30.0
GITHUB = "https://raw.githubusercontent.com"
GITHUB_LARGE = "https://media.githubusercontent.com/media"
"""Of files that a repository keeps in Git LFS."""


class PublicTrace(msgspec.Struct, frozen=True):
    """One file. Size and sha256 are of the file as published; None: unknown."""

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
        """What a fetched copy is called."""
        return f"{self.name}{Path(self.url).suffix}"


_MOONCAKE = "kvcache-ai/Mooncake"
_AZURE = "Azure/AzurePublicDataset"
_BAILIAN = "alibaba-edu/qwen-bailian-usagetraces-anon"
_BURSTGPT = "HPMLL/BurstGPT"
_RAGPULSE = "flashserve/RAGPulse"
_WEKA = "callanjfox/kv-cache-tester"


def _ragpulse(number: int, part: str, num_bytes: int, sha256: str) -> PublicTrace:
    file = f"{number}_{part}.jsonl"
    return PublicTrace(
        f"ragpulse-{number}_{part}",
        "ragpulse",
        f"{GITHUB}/{_RAGPULSE}/main/data/{file}",
        _RAGPULSE,
        "MIT",
        "a campus assistant's documents as content ids"
        if part == "trace"
        else "lengths of the documents",
        num_bytes,
        sha256,
    )


CATALOGUE = (
    PublicTrace(
        "mooncake-conversation",
        "mooncake",
        f"{GITHUB}/{_MOONCAKE}/main/FAST25-release/traces/conversation_trace.jsonl",
        _MOONCAKE,
        "Apache-2.0",
        "an hour of a chat service, 12,031 requests",
        3_029_533,
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
    ),
    PublicTrace(
        "mooncake-synthetic",
        "mooncake",
        f"{GITHUB}/{_MOONCAKE}/main/FAST25-release/traces/synthetic_trace.jsonl",
        _MOONCAKE,
        "Apache-2.0",
        "long documents and their questions, 3,993 requests",
        1_136_313,
        "bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
    ),
    PublicTrace(
        "bailian-thinking",
        "bailian",
        f"{GITHUB_LARGE}/{_BAILIAN}/main/qwen_thinking_blksz_16.jsonl",
        _BAILIAN,
        "see the repository",
        "a reasoning model's chats, 16-token blocks",
    ),
    PublicTrace(
        "bailian-coder",
        "bailian",
        f"{GITHUB_LARGE}/{_BAILIAN}/main/qwen_coder_blksz_16.jsonl",
        _BAILIAN,
        "see the repository",
        "a coding model's chats, 16-token blocks",
    ),
    PublicTrace(
        "weka-0001",
        "weka",
        f"{GITHUB}/{_WEKA}/main/traces/trace_0001.json",
        _WEKA,
        "Apache-2.0",
        "one of some 700 agentic coding sessions, a file each",
    ),
    PublicTrace(
        "azure-code",
        "azure",
        f"{GITHUB}/{_AZURE}/master/data/AzureLLMInferenceTrace_code.csv",
        _AZURE,
        "CC-BY-4.0",
        "arrivals and lengths of code completion, 8,819 requests",
        320_117,
        "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
    ),
    PublicTrace(
        "azure-conversation",
        "azure",
        f"{GITHUB}/{_AZURE}/master/data/AzureLLMInferenceTrace_conv.csv",
        _AZURE,
        "CC-BY-4.0",
        "arrivals and lengths of a chat service, 19,366 requests",
        719_188,
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
    ),
    PublicTrace(
        "burstgpt",
        "burstgpt",
        f"{GITHUB_LARGE}/{_BURSTGPT}/main/data/BurstGPT_without_fails_1.csv",
        _BURSTGPT,
        "CC-BY-4.0",
        "arrivals and lengths of two months of ChatGPT and GPT-4",
    ),
    _ragpulse(
        0,
        "trace",
        1_923_473,
        "cd371571bef3320907147f8901729e37f412aafb067ec8eb153e2828e1801e65",
    ),
    _ragpulse(
        1,
        "sys_prompt",
        315_609,
        "e7bf9bc66493629fa279d67ffb9d6a44e4ec3a7ac60549f5c679319c54564f6d",
    ),
    _ragpulse(
        2,
        "passages",
        347_002,
        "8575941cab2eb1cae25e589b7fab3ccb6affc3809e4156b1dc6db40d9e65b891",
    ),
    _ragpulse(
        3,
        "history",
        210_541,
        "fdd9b1ca962c2b4d0f48785497007e20aa961442eb93cb1afbe3f23c383ae467",
    ),
    _ragpulse(
        4,
        "user_input",
        278_133,
        "5adeff33a44850f5a1c0892aaaf7000114d7ac24821d4238175abb92b77dd12d",
    ),
    _ragpulse(
        5,
        "web_search",
        23_972,
        "5e4cba4e2e449eb1a26c1c94aa57a59204f29c8ed0395da03cf0f43b7d75891c",
    ),
)


class Fetcher(Protocol):
    """Opens a URL; the tests' reads a folder."""

    def __call__(self, url: str) -> BinaryIO:
        """Return the bytes as a file; raise `OSError` where that fails."""


def find(name: str) -> list[PublicTrace]:
    """Return the trace of that name, or all that begin with it.

    Raises:
        SetupError: there are none.
    """
    found = [one for one in CATALOGUE if one.name == name]
    found = found or [one for one in CATALOGUE if one.name.startswith(name)]
    if not found:
        names = ", ".join(one.name for one in CATALOGUE)
        raise SetupError(f"no trace {name!r}; known are {names}")
    return found


def open_url(url: str) -> BinaryIO:
    """Open a URL of the catalogue."""
    opened: BinaryIO = urllib.request.urlopen(url, timeout=TIMEOUT_S)
    return opened


def fetch(
    trace: PublicTrace,
    folder: Path,
    fetcher: Fetcher = open_url,
) -> Path:
    """Fetch a trace into a folder, unless a right copy is there; return its path.

    A file that is not what was pinned is not kept.

    Raises:
        SetupError: the network or the folder does not allow it, or the file differs.
    """
    path = folder / trace.file_name
    if path.exists() and trace.sha256 == sha256_of(path):
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with fetcher(trace.url) as source, part.open("wb") as target:
            while piece := source.read(READ_BYTES):
                target.write(piece)
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
            f"{trace.name}: {trace.url} is not what it was: {size} bytes with sha256 "
            f"{found}, wanted {trace.num_bytes} with {trace.sha256}"
        )


def sha256_of(path: Path) -> str:
    """Return a file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
