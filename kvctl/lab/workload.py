"""What engines are asked: workloads as iterators of accesses.

Every engine iterates the whole workload and plays its own share, so nobody hands out
work. All is a function of the workload and the seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvctl.lab.scenario import Chat, Mooncake, SharedPrefix, Workload
from kvctl.lab.traces import mooncake

Tokens = npt.NDArray[np.uint32]

PREFIX, SUFFIX, CHOICE, SYSTEM, TURN = range(5)
"""Streams of random numbers, apart from each other under one seed."""


@dataclass(frozen=True, slots=True)
class Access:
    """One request. `tokens()` makes the prompt, so that skipping one costs little."""

    request_id: str
    session: str
    affinity: int
    """Accesses of one affinity belong to one engine."""
    num_tokens: int
    output_length: int
    arrival_s: float | None
    tokens: Callable[[], Tokens]


@dataclass(frozen=True, slots=True)
class Survey:
    """What a workload amounts to."""

    num_requests: int
    num_tokens: int
    longest: int


def accesses(workload: Workload, seed: int) -> Iterator[Access]:
    """Iterate a workload in its order.

    Raises:
        SetupError: from a trace reader, with file, line and reason.
    """
    match workload:
        case SharedPrefix():
            return _shared_prefix(workload, seed)
        case Chat():
            return _chat(workload, seed)
        case Mooncake():
            return _mooncake(workload)


def survey(workload: Workload, seed: int) -> Survey:
    """Iterate once without making tokens."""
    lengths = [access.num_tokens for access in accesses(workload, seed)]
    return Survey(len(lengths), sum(lengths), max(lengths, default=0))


def _draw(vocabulary: int, num_tokens: int, *stream: int) -> Tokens:
    return np.random.default_rng(stream).integers(
        vocabulary, size=num_tokens, dtype=np.uint32
    )


def _shared_prefix(workload: SharedPrefix, seed: int) -> Iterator[Access]:
    rng = np.random.default_rng((seed, CHOICE))
    half = workload.suffix_tokens // 2
    for index in range(workload.num_requests):
        prefix = int(rng.integers(workload.num_prefixes))
        length = workload.suffix_tokens + int(rng.integers(-half, half + 1))
        yield Access(
            request_id=str(index),
            session=str(index),
            affinity=index,
            num_tokens=workload.prefix_tokens + length,
            output_length=0,
            arrival_s=None,
            tokens=partial(_prefix_tokens, workload, seed, prefix, index, length),
        )


def _prefix_tokens(
    workload: SharedPrefix, seed: int, prefix: int, index: int, length: int
) -> Tokens:
    vocabulary = workload.vocabulary
    return np.concatenate(
        (
            _draw(vocabulary, workload.prefix_tokens, seed, PREFIX, prefix),
            _draw(vocabulary, length, seed, SUFFIX, index),
        )
    )


def _chat(workload: Chat, seed: int) -> Iterator[Access]:
    """All sessions' first turns, then all second turns, and so on."""
    turn_tokens = workload.user_tokens + workload.answer_tokens
    for turn in range(workload.turns):
        length = workload.system_tokens + turn * turn_tokens + workload.user_tokens
        for session in range(workload.num_sessions):
            yield Access(
                request_id=f"{session}.{turn}",
                session=str(session),
                affinity=session,
                num_tokens=length,
                output_length=workload.answer_tokens,
                arrival_s=None,
                tokens=partial(_chat_tokens, workload, seed, session, length),
            )


def _chat_tokens(workload: Chat, seed: int, session: int, length: int) -> Tokens:
    """Cut a session's whole talk at this turn; earlier turns are its beginning."""
    spoken = workload.turns * (workload.user_tokens + workload.answer_tokens)
    system = _draw(workload.vocabulary, workload.system_tokens, seed, SYSTEM)
    talk = _draw(workload.vocabulary, spoken, seed, TURN, session)
    return np.concatenate((system, talk))[:length]


def _mooncake(workload: Mooncake) -> Iterator[Access]:
    rows = mooncake.read(Path(workload.trace or ""), workload.block_size)
    for index, row in enumerate(islice(rows, workload.max_requests)):
        session = row.session_id
        yield Access(
            request_id=str(index),
            session=str(index) if session is None else session,
            affinity=index if session is None else zlib.crc32(session.encode()),
            num_tokens=row.num_tokens,
            output_length=row.output_length,
            arrival_s=row.arrival_s,
            tokens=row.tokens,
        )
