"""Calls with the machine to themselves: what a rank reaches when nobody else plays.

Under load every process waits for a core, so a call's share of a plain copy says how
busy the machine was. After the load each rank in turn makes the same calls alone,
each beside a plain copy of as many bytes in the same process.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from kvcore.keys import SessionKey
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.latency_samples import LatencySamples, summarise
from kvctl.lab.process_messages import MeasureAlone, MeasuredAlone
from kvctl.lab.rank.rank_cache import Indices, Pattern, RankCacheMemory
from kvctl.lab.systems.system_interface import Client

COPY_BYTES = 16 << 20
ROUNDS = 12
WARM_UP_ROUNDS = 2
VOCABULARY = 32_000
SAMPLES = ("store", "plain_store", "retrieve", "plain_retrieve")
"""Timed in a round, in this order: each call, then a plain copy in its direction."""
BOTH = ("both", "plain_both")
"""Likewise, of a store and a retrieve at the same time."""


class IsolatedTimings(msgspec.Struct, frozen=True):
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


class IsolatedLookups(msgspec.Struct, frozen=True):
    """The median of lookups of so many tokens."""

    num_tokens: int
    seconds: float


def summarise_alone(
    reports: Sequence[MeasuredAlone],
    lookup: IsolatedLookups | None,
    bare: Ceilings | None,
) -> IsolatedTimings | None:
    """Put the ranks' calls together; None where none were made."""
    if not reports or lookup is None:
        return None
    num_bytes = reports[0].num_bytes
    # Tenants' chunks may have other sizes: rates are of calls of one.
    reports = [one for one in reports if one.num_bytes == num_bytes]
    times = LatencySamples.merge(one.samples for one in reports).summary()
    store, out, retrieve, back = (times[name].p50_s for name in SAMPLES)
    return IsolatedTimings(
        copy_bytes=num_bytes,
        plain_copy_gb_per_s=2 * num_bytes / (out + back) / 1e9,
        store_gb_per_s=num_bytes / store / 1e9,
        retrieve_gb_per_s=num_bytes / retrieve / 1e9,
        store=out / store,
        retrieve=back / retrieve,
        lookup_tokens=lookup.num_tokens,
        lookup_s=lookup.seconds,
        lookup=bare.lookup_round_trip_s / lookup.seconds if bare else None,
        ping_trip_s=bare.ping_round_trip_s if bare else 0.0,
    )


@dataclass(frozen=True, slots=True)
class CallerIdentity:
    """A registered cache that calls can be made with."""

    client: Client
    cache: RankCacheMemory
    patterns: Sequence[Pattern]
    model: str
    world_size: int
    engine_id: str
    instance_id: str
    chunk_bytes: int
    block_size: int


def measure_alone(seat: CallerIdentity, task: MeasureAlone) -> MeasuredAlone:
    """Store and retrieve chunks that nobody has, a plain copy beside each call.

    Bytes are checked after every retrieve, outside the timed part.

    Raises:
        KVError: a call failed.
    """
    num_chunks = max(1, task.max_bytes // seat.chunk_bytes)
    return IsolatedCaller(seat, num_chunks, task.seed).play(ROUNDS)


class IsolatedCaller:
    """Stores and retrieves so many chunks, in blocks at random or one after another."""

    def __init__(
        self,
        seat: CallerIdentity,
        num_chunks: int,
        seed: int,
        *,
        scattered: bool = True,
        both: bool = False,
    ) -> None:
        self.seat = seat
        self.both = both
        chunk_size = seat.client.chunk_size
        chunk_blocks = chunk_size // seat.block_size
        num_chunks = min(num_chunks, seat.cache.num_blocks(0) // chunk_blocks)
        self.num_bytes = num_chunks * seat.chunk_bytes
        rng = np.random.default_rng(seed)
        self.end = num_chunks * chunk_size
        self.tokens = rng.integers(VOCABULARY, size=self.end, dtype=np.uint32)
        orders = [
            rng.permutation(seat.cache.num_blocks(group))
            if scattered
            else np.arange(seat.cache.num_blocks(group))
            for group in range(len(seat.cache.groups))
        ]
        num_blocks = num_chunks * chunk_blocks
        self.blocks = [order[:num_blocks].astype(np.int32) for order in orders]
        self.others = [order[-num_blocks:].astype(np.int32) for order in orders]
        """Blocks to retrieve to while the first ones are stored."""
        self.seeds = rng.integers(1 << 63, size=num_chunks, dtype=np.uint64)
        self.spans: list[tuple[float, float]] = []
        """When calls were under way."""
        for pattern, ids in zip(seat.patterns, self.blocks, strict=True):
            pattern.write(self.seeds, ids)

    def play(
        self, rounds: int, begin: Callable[[], None] = lambda: None
    ) -> MeasuredAlone:
        """Make so many calls of each kind; `begin` is called when it is warm."""
        names = (*SAMPLES, *BOTH) if self.both else SAMPLES
        times: dict[str, list[float]] = {name: [] for name in names}
        wrong = 0
        for number in range(WARM_UP_ROUNDS + rounds):
            if number == WARM_UP_ROUNDS:
                begin()
                self.spans.clear()
            taken = self._round(number)
            wrong += self._count_wrong_bytes(self.blocks)
            if self.both:
                taken |= self._round_of_both(number)
                wrong += self._count_wrong_bytes(self.others)
            if number >= WARM_UP_ROUNDS:
                for name, seconds in taken.items():
                    times[name].append(seconds)
        packed = {name: array("d", each) for name, each in times.items()}
        return MeasuredAlone(self.num_bytes, LatencySamples.pack(packed), wrong)

    def _round(self, number: int) -> dict[str, float]:
        """Make one call each on tokens that are new: the first token says so."""
        seat, end = self.seat, self.end
        self.tokens[0] = VOCABULARY + number
        session = SessionKey(seat.engine_id, f"alone {seat.instance_id} {number}")
        where = (session, seat.instance_id, 0, end, self.blocks, self.tokens)
        # The scheduler's lookup has brought the tokens, as with a real engine.
        seat.client.lookup(session, seat.model, seat.world_size, self.tokens)
        store = self._call(lambda: seat.client.store(*where))
        out = _timed(lambda: seat.cache.copy_out(number, self.num_bytes))
        for group, ids in enumerate(self.blocks):
            seat.cache.poison(group, ids)
        retrieve = self._call(lambda: seat.client.retrieve(*where))
        back = _timed(lambda: seat.cache.copy_in(number, self.num_bytes))
        seat.client.end_session(session)
        return dict(zip(SAMPLES, (store, out, retrieve, back), strict=True))

    def _round_of_both(self, number: int) -> dict[str, float]:
        """Store new tokens while what this round stored is retrieved elsewhere."""
        seat, end = self.seat, self.end
        first, second = (
            SessionKey(seat.engine_id, f"{name} {seat.instance_id} {number}")
            for name in BOTH
        )
        back = (first, seat.instance_id, 0, end, self.others, self.tokens)
        tokens = self.tokens.copy()
        tokens[1] = VOCABULARY
        out = (second, seat.instance_id, 0, end, self.blocks, tokens)
        for group, ids in enumerate(self.others):
            seat.cache.poison(group, ids)

        def both() -> None:
            with ThreadPoolExecutor(1) as other:
                stored = other.submit(seat.client.store, *out)
                seat.client.retrieve(*back)
                stored.result()

        taken = self._call(both)
        plain = _timed(lambda: seat.cache.copy_both(number, self.num_bytes))
        for session in (first, second):
            seat.client.end_session(session)
        return dict(zip(BOTH, (taken, plain), strict=True))

    def _call(self, call: Callable[[], object]) -> float:
        begun = perf_counter()
        taken = _timed(call)
        self.spans.append((begun, begun + taken))
        return taken

    def _count_wrong_bytes(self, blocks: Sequence[Indices]) -> int:
        return sum(
            pattern.count_wrong_bytes(self.seeds, ids)
            for pattern, ids in zip(self.seat.patterns, blocks, strict=True)
        )


def _timed(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun


def median_of(
    call: Callable[[int], float], rounds: int, num_tokens: int
) -> IsolatedLookups:
    """Take the median of what a call, told its number, measured."""
    taken = np.array([call(number) for number in range(rounds)])
    return IsolatedLookups(num_tokens, summarise(taken).p50_s)
