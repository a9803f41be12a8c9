"""Simulated hits of a trace in a cache of a given size, with the server's policies.

No bytes are copied. A request finds its leading blocks up to the first missing one,
stores the missing ones like the server (it evicts others, never its own, and stops when
none can be evicted), and its blocks are touched at its end, last to first. With full
blocks, chunks of one block and one request at a time the server has the same hits.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from kvcore.errors import SetupError
from kvcore.keys import ChunkHash
from kvcore.storage.eviction import POLICIES, EvictionPolicy, make_policy
from kvctl.console import Table
from kvctl.lab.config.workload_config import Trace
from kvctl.lab.traces import trace_reader as reader
from kvctl.lab.traces.trace_rows import TraceRow

__all__ = [
    "POLICIES",
    "NumberedRequests",
    "SimulatedL1",
    "SimulationRow",
    "capacity_blocks",
    "load",
    "number",
    "simulate",
    "table",
]

IDEAL = "ideal"
"""Name of the infinite cache (upper bound)."""
OPTIMUM = "optimum"
"""Name of Belady's policy, which knows the future."""

MAX_CAPACITY = 1 << 62

Ids = npt.NDArray[np.int64]


class SimulationRow(Struct, frozen=True):
    """Hits of one policy over a whole trace."""

    trace: str
    policy: str
    capacity_blocks: int
    block_hits: int
    token_hits: int
    block_accesses: int
    token_accesses: int


@dataclass(frozen=True, slots=True)
class NumberedRequests:
    """A trace as its requests' blocks, renumbered from 0."""

    name: str
    blocks: list[Ids]
    num_tokens: list[int]
    block_sizes: list[int]
    num_unique: int

    def row(self, policy: str, capacity: int, hits: Sequence[int]) -> SimulationRow:
        """Return the row of the leading blocks that each request found."""
        found = zip(hits, self.block_sizes, self.num_tokens, strict=True)
        return SimulationRow(
            trace=self.name,
            policy=policy,
            capacity_blocks=capacity,
            block_hits=sum(hits),
            token_hits=sum(min(n * size, tokens) for n, size, tokens in found),
            block_accesses=sum(map(len, self.blocks)),
            token_accesses=sum(self.num_tokens),
        )


def load(path: Path) -> NumberedRequests:
    """Return the requests of a trace of any format that has prefixes.

    Raises:
        SetupError: with file, line and reason.
    """
    return number(str(path), list(reader.read(Trace(trace=str(path)))))


def number(name: str, rows: Sequence[TraceRow]) -> NumberedRequests:
    """Renumber the blocks of rows; a block is an id and a block size."""
    blocks: list[Ids] = [np.empty(0, np.int64)] * len(rows)
    num_unique = 0
    for size in {row.block_size for row in rows}:
        chosen = [index for index, row in enumerate(rows) if row.block_size == size]
        ids = np.concatenate([rows[index].hash_ids for index in chosen])
        known, numbers = np.unique(ids, return_inverse=True)
        cuts = np.cumsum([len(rows[index].hash_ids) for index in chosen])[:-1]
        for index, cut in zip(
            chosen, np.split(numbers + num_unique, cuts), strict=True
        ):
            blocks[index] = cut
        num_unique += known.size
    return NumberedRequests(
        name=name,
        blocks=blocks,
        num_tokens=[row.num_tokens for row in rows],
        block_sizes=[row.block_size for row in rows],
        num_unique=num_unique,
    )


def simulate(
    requests: NumberedRequests, policies: Sequence[str], capacities: Iterable[str]
) -> Iterator[SimulationRow]:
    """Simulate a trace with each policy at each capacity.

    Capacities as in `capacity_blocks`. The infinite cache comes first, then per
    capacity the optimum and the policies.

    Raises:
        SetupError: no such policy, or no such capacity.
    """
    sizes = [capacity_blocks(text, requests.num_unique) for text in capacities]
    for policy in policies:
        if policy not in POLICIES:
            known = ", ".join(sorted(POLICIES))
            raise SetupError(f"--policy {policy}: known policies are {known}")
    listed = [cast("list[ChunkHash]", ids.tolist()) for ids in requests.blocks]
    most = max(1, requests.num_unique)
    yield requests.row(IDEAL, most, optimum(requests.blocks, most))
    for size in sizes:
        yield requests.row(OPTIMUM, size, optimum(requests.blocks, size))
        for policy in policies:
            cache = SimulatedL1(make_policy(policy), size)
            yield requests.row(policy, size, [cache.serve(each) for each in listed])


def capacity_blocks(text: str, num_unique: int) -> int:
    """Return a number of blocks, given as such or as a share of the unique ones, `10%`.

    Raises:
        SetupError: the text is neither, or not positive.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        size = float(number) if percent else int(number)
    except ValueError:
        size = 0
    if rest or not 0 < size < MAX_CAPACITY:
        raise SetupError(
            f"--capacity {text}: must be a number of blocks or a share such as 10%"
        )
    return max(1, int(size * num_unique / 100 if percent else size))


def table(requests: NumberedRequests, rows: Sequence[SimulationRow]) -> Table:
    """Return a table of rows with hit rates and shares of the infinite cache's hits."""
    ideal = max((row.block_hits for row in rows if row.policy == IDEAL), default=0)
    return Table(
        f"{requests.name}: {len(requests.blocks):,} requests, "
        f"{requests.num_unique:,} unique blocks",
        (">capacity", "policy", ">block hits", ">of blocks", ">of tokens", ">of ideal"),
        tuple(
            (
                f"{row.capacity_blocks:,}",
                row.policy,
                f"{row.block_hits:,}",
                f"{row.block_hits / max(1, row.block_accesses):.4f}",
                f"{row.token_hits / max(1, row.token_accesses):.4f}",
                f"{row.block_hits / max(1, ideal):.1%}",
            )
            for row in rows
        ),
    )


class SimulatedL1:
    """The set of chunks in L1 under a policy, one request at a time.

    Blocks stand for chunks: a policy only compares keys.
    """

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self._policy = policy
        self._capacity = capacity
        self._present: set[ChunkHash] = set()

    def serve(self, blocks: Sequence[ChunkHash]) -> int:
        """Look up, store and end a request; return the leading blocks found."""
        present = self._present
        hits, num_stored = len(blocks), 0
        if not present.issuperset(blocks):
            hits = next(i for i, block in enumerate(blocks) if block not in present)
            missing = [block for block in blocks if block not in present]
            num_stored = self._store(blocks, list(dict.fromkeys(missing)))
            if num_stored < len(missing):
                blocks = [block for block in blocks if block in present]
        _each(self._policy.touch, reversed(blocks))
        return hits

    def _store(self, blocks: Sequence[ChunkHash], missing: Sequence[ChunkHash]) -> int:
        num_over = len(missing) - (self._capacity - len(self._present))
        if num_over > 0:
            num_over -= self._evict(num_over, blocks)
            missing = missing[: len(missing) - num_over]
        self._present.update(missing)
        return len(missing)

    def _evict(self, count: int, blocks: Sequence[ChunkHash]) -> int:
        """Evict blocks that are not the request's own; return how many were evicted."""
        own = frozenset(blocks)
        passed_over: set[ChunkHash] = set()

        def evictable(block: ChunkHash) -> bool:
            if block in own:
                passed_over.add(block)
                return False
            return True

        for evicted in range(count):
            victim = self._policy.evict(evictable)
            if victim is None:
                count = evicted
                break
            self._present.remove(victim)
        if passed_over:
            again = [block for block in reversed(blocks) if block in passed_over]
            _each(self._policy.admit, again)
        return count


def _each(call: Callable[[ChunkHash], None], blocks: Iterable[ChunkHash]) -> None:
    """Call for every block, without a Python loop."""
    deque(map(call, blocks), maxlen=0)


def optimum(requests: Sequence[Ids], capacity: int) -> list[int]:
    """Return the leading blocks that each request finds under Belady's policy.

    Of the present and the requested blocks, those requested again soonest are kept; a
    block may be bypassed. Among blocks that the same request needs next, later ones are
    evicted first, so that no prefix is evicted before its suffix.

    Source: Belady 1966; Mattson et al. 1970.
    """
    following = _following(np.concatenate(requests) if requests else np.empty(0))
    ends = accumulate(map(len, requests), initial=0)
    due: set[int] = set()
    """Index of the next access of each kept block, among all accesses."""
    latest: list[int] = []
    """The same, negated, as a heap; past accesses remain at its end."""
    hits = []
    for start, blocks in zip(ends, requests, strict=False):
        places = range(start, start + len(blocks))
        hits.append(
            next((i for i, at in enumerate(places) if at not in due), len(blocks))
        )
        due.difference_update(places)
        for again in following[start : start + len(blocks)]:
            if again >= 0:
                due.add(again)
                heapq.heappush(latest, -again)
        while len(due) > capacity:
            due.discard(-heapq.heappop(latest))
    return hits


def _following(ids: npt.NDArray[np.float64] | Ids) -> list[int]:
    """Return the index of the next access of each access's block; -1 if none."""
    order = np.argsort(ids, kind="stable")
    again = ids[order[1:]] == ids[order[:-1]]
    following = np.full(ids.size, -1)
    following[order[:-1][again]] = order[1:][again]
    places: list[int] = following.tolist()
    return places
