"""WEKA's JSON: one coding session per file, with nested subagents.

A file holds `id`, `block_size`, `hash_id_scope` and `requests` of `t` (s), `in`,
`out` and `hash_ids`; an entry of type `subagent` holds its own requests, with
times since its start or the session's. Ids of scope `local` are valid within their
session only. Source: callanjfox/kv-cache-tester, traces/.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from kvcore.errors import SetupError
from kvctl.lab.traces.trace_rows import MIN_BLOCK_SIZE, TraceRow, make_row, raw_lines

BLOCK_SIZE = 64
LOCAL_BITS = 40
"""Bits of a session-local id; the number of the session is in the higher bits."""
SUFFIXES = (".json", ".json.gz", ".json.zst")


class _WekaRequest(msgspec.Struct):
    t: Annotated[float, Meta(ge=0)] = 0.0
    type: str = "n"
    num_in: Annotated[int, Meta(ge=0)] = msgspec.field(default=0, name="in")
    num_out: Annotated[int, Meta(ge=0)] = msgspec.field(default=0, name="out")
    hash_ids: list[int] = []
    requests: list[_WekaRequest] = []
    agent_id: str | int | None = None


class _Session(msgspec.Struct):
    requests: list[_WekaRequest]
    id: str = ""
    block_size: Annotated[int, Meta(ge=MIN_BLOCK_SIZE)] = BLOCK_SIZE
    hash_id_scope: str = "local"


@dataclass(frozen=True, slots=True)
class _Placed:
    at_s: float
    session: str
    request: _WekaRequest


def read(path: Path) -> Iterator[TraceRow]:
    """Yield the rows of a session, or of a folder of sessions that all start at 0.

    Rows are ordered by time; `line` is the position in the session.

    Raises:
        SetupError: with the file and the reason.
    """
    files = [path] if path.is_file() else _session_files(path)
    sessions = [_session(file, number) for number, file in enumerate(files)]
    return heapq.merge(*sessions, key=lambda row: row.arrival_s)


def _session_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.name.endswith(SUFFIXES))
    if not files:
        raise SetupError(f"{folder}: no session files (*.json)")
    return files


def _session(path: Path, number: int) -> list[TraceRow]:
    try:
        session = msgspec.json.decode(b"".join(raw_lines(path)), type=_Session)
    except (OSError, EOFError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"{path}: {reason}") from None
    name = session.id or path.name.partition(".")[0]
    placed = sorted(_flat(session.requests, name, 0.0), key=lambda one: one.at_s)
    rows = []
    for place, one in enumerate(placed, 1):
        try:
            rows.append(_row(one, place, session, number))
        except ValueError as error:
            raise SetupError(f"{path}: request {place}: {error}") from None
    return rows


def _flat(requests: list[_WekaRequest], name: str, begin_s: float) -> Iterator[_Placed]:
    """Yield all requests; each subagent is a separate session."""
    for place, request in enumerate(requests):
        at_s = begin_s + request.t
        if request.type == "subagent":
            inner = request.requests
            relative = bool(inner) and inner[0].t < request.t
            child = f"{name}/{request.agent_id or place}"
            yield from _flat(inner, child, at_s if relative else begin_s)
        elif request.num_in:
            yield _Placed(at_s, name, request)


def _row(one: _Placed, place: int, session: _Session, number: int) -> TraceRow:
    ids = one.request.hash_ids
    if session.hash_id_scope == "local":
        if ids and max(ids) >= 1 << LOCAL_BITS:
            raise ValueError(f"a local hash id of more than {LOCAL_BITS} bits")
        ids = [(number << LOCAL_BITS) + one_id for one_id in ids]
    return make_row(
        line=place,
        arrival_s=one.at_s,
        num_tokens=one.request.num_in,
        output_length=one.request.num_out,
        hash_ids=ids,
        block_size=session.block_size,
        session_id=one.session,
    )
