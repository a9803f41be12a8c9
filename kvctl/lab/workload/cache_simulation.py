"""What a cache of so many blocks would have hit: a trace through the server's policies.

No bytes move and nothing is timed. A request finds its leading blocks up to the first
missing one, stores what is missing as the server does (evicting others, never its own,
and stopping where nothing more can go), and is touched at its end, tail to head. With
full blocks, chunks of one block and one request at a time the server hits the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from kvcore.errors import SetupError
from kvcore.keys import ChunkHash
from kvcore.storage.eviction import POLICIES, EvictionPolicy, make_policy
from kvctl.console import Table
from kvctl.lab.traces import trace_reader as reader
from kvctl.lab.traces.trace_row import TraceRow
from kvctl.lab.workload.belady import optimum
from kvctl.lab.workload.workload_config import Trace

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
"""In place of a policy: nothing is ever evicted."""
OPTIMUM = "optimum"
"""In place of a policy: what is needed soonest is kept."""

MAX_CAPACITY = 1 << 62

Ids = npt.NDArray[np.int64]


class SimulationRow(Struct, frozen=True):
    """A policy's hits over a whole trace."""

    trace: str
    policy: str
    capacity_blocks: int
    block_hits: int
    token_hits: int
    block_accesses: int
    token_accesses: int


@dataclass(frozen=True, slots=True)
class NumberedRequests:
    """A trace as its requests' blocks, numbered anew from 0."""

    name: str
    blocks: list[Ids]
    num_tokens: list[int]
    block_sizes: list[int]
    num_unique: int

    def row(self, policy: str, capacity: int, hits: Sequence[int]) -> SimulationRow:
        """Add up the leading blocks that each request found."""
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
    """Read a trace of any format that is replayed as prefixes.

    Raises:
        SetupError: with file, line and reason.
    """
    return number(str(path), list(reader.read(Trace(trace=str(path)))))


def number(name: str, rows: Sequence[TraceRow]) -> NumberedRequests:
    """Number the blocks of rows; equal ids are one block where they are of one size."""
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
    """Play a trace against each policy at each capacity; ideal and optimum beside.

    Capacities as in `capacity_blocks`. The ideal comes first, then a capacity's
    optimum and its policies.

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
    """Read a number of blocks, or a share of the unique ones, `10%`; at least one.

    Raises:
        SetupError: neither of them, or nothing at all.
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
    """Show rows with their rates and their share of the ideal's blocks."""
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
    """L1 without memory: what `ChunkTable` does with a policy, one request at a time.

    Blocks stand for chunks; the policy neither knows nor minds.
    """

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self._policy = policy
        self._capacity = capacity
        self._present: set[ChunkHash] = set()

    def serve(self, blocks: Sequence[ChunkHash]) -> int:
        """Look up, store and end a request; return the leading blocks it found."""
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
        lacking = len(missing) - (self._capacity - len(self._present))
        if lacking > 0:
            lacking -= self._evict(lacking, blocks)
            missing = missing[: len(missing) - lacking]
        self._present.update(missing)
        return len(missing)

    def _evict(self, count: int, blocks: Sequence[ChunkHash]) -> int:
        """Make room for a request beside its own blocks; return how many went."""
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
    """Call for every block, without a loop of bytecode."""
    deque(map(call, blocks), maxlen=0)
