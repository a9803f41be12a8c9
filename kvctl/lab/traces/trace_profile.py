"""Profile of a trace: requests, times, lengths, possible reuse."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec
import numpy as np

from kvctl.lab.traces.ragpulse_trace import RagPulseRow
from kvctl.lab.traces.trace_rows import TraceRow

NUM_BINS = 60


class Lengths(msgspec.Struct, frozen=True):
    """Tokens per request."""

    total: int
    p50: int
    p90: int
    p99: int
    longest: int


class Profile(msgspec.Struct, frozen=True):
    """Profile of a whole trace. Ideal hit rates are those of one infinite cache."""

    num_requests: int
    num_sessions: int
    span_s: float
    most_at_once: int
    """Requests that share one timestamp."""
    prompts: Lengths
    answers: Lengths
    block_sizes: tuple[int, ...]
    """Empty for contents of any length, which count as blocks."""
    num_blocks: int
    num_unique_blocks: int
    ideal_hit_rate: float
    """Of blocks, including the partial last one of a prompt."""
    ideal_token_hit_rate: float
    arrivals: tuple[int, ...]
    """Requests in each of NUM_BINS parts of the span."""
    prompt_lengths: tuple[int, ...]
    """Requests by floor(log2(tokens))."""
    hit_rates: tuple[float, ...]
    """Ideal hit rate in each of NUM_BINS groups of requests."""
    anywhere_hit_rate: float | None = None
    """Share of contents of earlier requests at any position; None for blocks."""


@dataclass(slots=True)
class Profiler:
    """Accumulates rows; keeps five numbers per request and the id of each block."""

    _times: array[float] = field(default_factory=lambda: array("d"))
    _prompts: array[int] = field(default_factory=lambda: array("q"))
    _answers: array[int] = field(default_factory=lambda: array("q"))
    _blocks: array[int] = field(default_factory=lambda: array("q"))
    _hits: array[int] = field(default_factory=lambda: array("q"))
    _seen: set[int] = field(default_factory=set)
    _sessions: set[str] = field(default_factory=set)
    _block_sizes: set[int] = field(default_factory=set)
    _tokens_hit: int = 0
    _prefixes: set[bytes] = field(default_factory=set)
    _num_anywhere: int | None = None

    def add(self, row: TraceRow | RagPulseRow) -> None:
        """Add a row of blocks, or of contents at any position."""
        if isinstance(row, TraceRow):
            self._add_blocks(row)
        else:
            self._add_contents(row)

    def _add_blocks(self, row: TraceRow) -> None:
        ids = row.hash_ids.tolist()
        hit = 0
        for one in ids:
            if one not in self._seen:
                break
            hit += 1
        self._block_sizes.add(row.block_size)
        self._record(row, row.num_tokens, ids, hit)
        self._tokens_hit += min(hit * row.block_size, row.num_tokens)

    def _add_contents(self, row: RagPulseRow) -> None:
        ids = [content.id for content in row.contents]
        lengths = [content.num_tokens for content in row.contents]
        prefix, hit = b"", 0
        for place, one in enumerate(ids):
            prefix = sha256(prefix + one.to_bytes(8, "little")).digest()
            if hit == place and prefix in self._prefixes:
                hit += 1
            self._prefixes.add(prefix)
        known = sum(one in self._seen for one in ids)
        self._num_anywhere = (self._num_anywhere or 0) + known
        self._record(row, sum(lengths), ids, hit)
        self._tokens_hit += sum(lengths[:hit])

    def _record(
        self,
        row: TraceRow | RagPulseRow,
        num_tokens: int,
        ids: list[int],
        hit: int,
    ) -> None:
        self._seen.update(ids)
        self._times.append(row.arrival_s)
        self._prompts.append(num_tokens)
        self._answers.append(row.output_length)
        self._blocks.append(len(ids))
        self._hits.append(hit)
        if row.session_id is not None:
            self._sessions.add(row.session_id)

    def profile(self) -> Profile:
        """Return the profile of all rows added."""
        times = np.frombuffer(self._times) if self._times else np.zeros(0)
        prompts = np.array(self._prompts, np.int64)
        num_blocks, num_hits = sum(self._blocks), sum(self._hits)
        ties = np.unique(times, return_counts=True)[1]
        return Profile(
            num_requests=times.size,
            num_sessions=len(self._sessions),
            span_s=float(times.max() - times.min()) if times.size else 0.0,
            most_at_once=int(ties.max(initial=0)),
            prompts=_lengths(prompts),
            answers=_lengths(np.array(self._answers, np.int64)),
            block_sizes=tuple(sorted(self._block_sizes)),
            num_blocks=num_blocks,
            num_unique_blocks=len(self._seen),
            ideal_hit_rate=num_hits / max(1, num_blocks),
            ideal_token_hit_rate=self._tokens_hit / max(1, int(prompts.sum())),
            arrivals=_histogram(times),
            prompt_lengths=_by_power(prompts),
            hit_rates=_rates(self._hits, self._blocks),
            anywhere_hit_rate=(
                None
                if self._num_anywhere is None
                else self._num_anywhere / max(1, num_blocks)
            ),
        )


def profile(rows: Iterable[TraceRow] | Iterable[RagPulseRow]) -> Profile:
    """Return the profile of a trace of blocks, or of contents."""
    profiler = Profiler()
    for row in rows:
        profiler.add(row)
    return profiler.profile()


Numbers = np.typing.NDArray[np.int64]


def _lengths(values: Numbers) -> Lengths:
    if not values.size:
        return Lengths(0, 0, 0, 0, 0)
    points = np.quantile(values, (0.5, 0.9, 0.99), method="inverted_cdf")
    p50, p90, p99 = (int(point) for point in points)
    return Lengths(int(values.sum()), p50, p90, p99, int(values.max()))


def _histogram(times: np.typing.NDArray[np.float64]) -> tuple[int, ...]:
    if not times.size:
        return ()
    return tuple(np.histogram(times, NUM_BINS)[0].tolist())


def _by_power(values: Numbers) -> tuple[int, ...]:
    if not values.size:
        return ()
    return tuple(np.bincount(np.log2(np.maximum(values, 1)).astype(int)).tolist())


def _rates(hits: Sequence[int], blocks: Sequence[int]) -> tuple[float, ...]:
    if not len(hits):
        return ()
    bins = np.arange(len(hits)) * min(NUM_BINS, len(hits)) // len(hits)
    total = np.bincount(bins, np.array(blocks))
    return tuple((np.bincount(bins, np.array(hits)) / np.maximum(total, 1)).tolist())
