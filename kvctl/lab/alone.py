"""Calls with the machine to themselves: what a rank reaches when nobody else plays.

Under load every process waits for a core, so a call's share of a plain copy says how
busy the machine was. After the load each rank in turn makes the same calls alone,
each beside a plain copy of as many bytes in the same process.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvcore.keys import SessionKey
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.measure import Samples, summarise
from kvctl.lab.messages import AloneDone, PlayAlone

if TYPE_CHECKING:
    from kvctl.lab.worker import Rank

Bytes = npt.NDArray[np.uint8]

COPY_BYTES = 16 << 20
ROUNDS = 12
WARM_UP_ROUNDS = 2
VOCABULARY = 32_000


class Alone(msgspec.Struct, frozen=True):
    """Medians of calls made alone; shares are of the copy or trip beside them."""

    copy_bytes: int
    plain_copy_gb_per_s: float
    store_gb_per_s: float
    retrieve_gb_per_s: float
    store: Annotated[float, Meta(description="share of the plain copy")]
    retrieve: Annotated[float, Meta(description="share of the plain copy")]
    lookup_tokens: int
    lookup_s: float
    lookup: Annotated[
        float | None, Meta(description="share of a bare round trip of its size")
    ] = None
    ping_trip_s: Annotated[
        float, Meta(description="a bare round trip, which a copy cannot do without")
    ] = 0.0


class LookupAlone(msgspec.Struct, frozen=True):
    """The median of lookups of so many tokens."""

    num_tokens: int
    seconds: float


def summarise_alone(
    reports: Sequence[AloneDone],
    lookup: LookupAlone | None,
    bare: Ceilings | None,
) -> Alone | None:
    """Put the ranks' calls together; None where none were made."""
    if not reports or lookup is None:
        return None
    num_bytes = reports[0].num_bytes
    # Tenants' chunks may have other sizes: rates are of calls of one.
    reports = [one for one in reports if one.num_bytes == num_bytes]
    times = Samples.merge(one.samples for one in reports).summary()
    copy, store, retrieve = (
        times[name].p50_s for name in ("copy", "store", "retrieve")
    )
    return Alone(
        copy_bytes=num_bytes,
        plain_copy_gb_per_s=num_bytes / copy / 1e9,
        store_gb_per_s=num_bytes / store / 1e9,
        retrieve_gb_per_s=num_bytes / retrieve / 1e9,
        store=copy / store,
        retrieve=copy / retrieve,
        lookup_tokens=lookup.num_tokens,
        lookup_s=lookup.seconds,
        lookup=bare.lookup_round_trip_s / lookup.seconds if bare else None,
        ping_trip_s=bare.ping_round_trip_s if bare else 0.0,
    )


def play_alone(rank: Rank, task: PlayAlone) -> AloneDone:
    """Store and retrieve chunks that nobody has, a plain copy between the calls.

    Bytes are checked after every retrieve, outside the timed part.

    Raises:
        KVError: a call failed.
    """
    return _Soloist(rank, task).play()


class _Soloist:
    def __init__(self, rank: Rank, task: PlayAlone) -> None:
        self.rank = rank
        chunk_blocks = rank.chunk_size // rank.block_size
        num_chunks = min(
            max(1, task.max_bytes // rank.chunk_bytes),
            rank.cache.views[0].shape[0] // chunk_blocks,
        )
        rng = np.random.default_rng(task.seed)
        self.end = num_chunks * rank.chunk_size
        self.num_bytes = min(num_chunks * rank.chunk_bytes, rank.scratch.size)
        self.tokens = rng.integers(VOCABULARY, size=self.end, dtype=np.uint32)
        self.blocks = [
            rng.permutation(len(view))[: num_chunks * chunk_blocks].astype(np.int32)
            for view in rank.cache.views
        ]
        self.seeds = rng.integers(1 << 63, size=num_chunks, dtype=np.uint64)
        for pattern, ids in zip(rank.patterns, self.blocks, strict=True):
            pattern.write(self.seeds, ids)

    def play(self) -> AloneDone:
        times: dict[str, list[float]] = {"copy": [], "store": [], "retrieve": []}
        wrong = 0
        for number in range(WARM_UP_ROUNDS + ROUNDS):
            taken = self._round(number)
            wrong += self._count_wrong_bytes()
            if number >= WARM_UP_ROUNDS:
                for name, seconds in taken.items():
                    times[name] += seconds
        packed = {name: array("d", each) for name, each in times.items()}
        return AloneDone(self.num_bytes, Samples.pack(packed), wrong)

    def _round(self, number: int) -> dict[str, list[float]]:
        """Make one call each on tokens that are new: the first token says so."""
        rank, end = self.rank, self.end
        self.tokens[0] = VOCABULARY + number
        session = SessionKey(rank.engine_id, f"alone {rank.instance_id} {number}")
        where = (session, rank.instance_id, 0, end, self.blocks, self.tokens)
        # The scheduler's lookup has brought the tokens, as with a real engine.
        rank.client.lookup(session, rank.model, rank.world_size, self.tokens)
        store = _timed(lambda: rank.client.store(*where))
        first = _timed(lambda: self._copy(2 * number))
        for group, ids in enumerate(self.blocks):
            rank.cache.poison(group, ids)
        retrieve = _timed(lambda: rank.client.retrieve(*where))
        second = _timed(lambda: self._copy(2 * number + 1))
        rank.client.end_session(session)
        return {"copy": [first, second], "store": [store], "retrieve": [retrieve]}

    def _copy(self, number: int) -> None:
        """Copy to and from other places each time, as the calls find their blocks.

        Into the same bytes again a processor's cache would take it, and not memory.
        """
        source, target = (
            _part(array, number, self.num_bytes)
            for array in (self.rank.cache.segment.array, self.rank.scratch)
        )
        np.copyto(target, source)

    def _count_wrong_bytes(self) -> int:
        return sum(
            pattern.count_wrong_bytes(self.seeds, ids)
            for pattern, ids in zip(self.rank.patterns, self.blocks, strict=True)
        )


def _part(array: Bytes, number: int, num_bytes: int) -> Bytes:
    """Return one of the array's parts, another for every number while there are."""
    start = number % (array.size // num_bytes) * num_bytes
    return array[start : start + num_bytes]


def _timed(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun


def median_of(
    call: Callable[[int], float], rounds: int, num_tokens: int
) -> LookupAlone:
    """Take the median of what a call, told its number, measured."""
    taken = np.array([call(number) for number in range(rounds)])
    return LookupAlone(num_tokens, summarise(taken).p50_s)
