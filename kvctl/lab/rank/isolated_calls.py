"""Latency of single calls without load, beside plain copies of equal size.

Under load all processes compete for the cores, so the rate of a call relative to a
plain copy depends on how busy the machine is. After the load each rank makes the same
calls alone, each next to a plain copy of as many bytes in the same process.
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
from kvcore.protocol import RegisterKVCache
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.config.model_geometry import Indices
from kvctl.lab.latency import LatencySamples, summarise
from kvctl.lab.process_messages import IsolatedCallTimes, MeasureIsolatedCalls
from kvctl.lab.rank.rank_cache import Pattern, RankCacheMemory
from kvctl.lab.systems.system_interface import Client

COPY_BYTES = 16 << 20
ROUNDS = 12
WARM_UP_ROUNDS = 2
VOCABULARY = 32_000
SAMPLES = ("store", "plain_store", "retrieve", "plain_retrieve")
"""Timed in each round, in this order: a call, then a plain copy in its direction."""
BOTH = ("both", "plain_both")
"""A concurrent store and retrieve, then two plain copies."""


class IsolatedTimings(msgspec.Struct, frozen=True):
    """Medians of isolated calls; shares are relative to the copy or round trip."""

    copy_bytes: int
    plain_copy_gb_per_s: float
    store_gb_per_s: float
    retrieve_gb_per_s: float
    store: Annotated[float, Meta(description="share of the plain copy's rate")]
    retrieve: Annotated[float, Meta(description="share of the plain copy's rate")]
    lookup_tokens: int
    lookup_s: float
    lookup: Annotated[
        float | None, Meta(description="bare round trip of its size / lookup")
    ] = None
    ping_trip_s: Annotated[
        float, Meta(description="bare round trip, the minimum of any call")
    ] = 0.0


class IsolatedLookups(msgspec.Struct, frozen=True):
    """The median of lookups of `num_tokens` tokens."""

    num_tokens: int
    seconds: float


def summarise_isolated(
    reports: Sequence[IsolatedCallTimes],
    lookup: IsolatedLookups | None,
    bare: Ceilings | None,
) -> IsolatedTimings | None:
    """Return the medians over all ranks; None without measurements."""
    if not reports or lookup is None:
        return None
    num_bytes = reports[0].num_bytes
    # Tenants may have chunks of other sizes: rates are of calls of one size.
    reports = [one for one in reports if one.num_bytes == num_bytes]
    times = LatencySamples.merge(one.samples for one in reports).summary()
    store, plain_store, retrieve, plain_retrieve = (
        times[name].p50_s for name in SAMPLES
    )
    return IsolatedTimings(
        copy_bytes=num_bytes,
        plain_copy_gb_per_s=2 * num_bytes / (plain_store + plain_retrieve) / 1e9,
        store_gb_per_s=num_bytes / store / 1e9,
        retrieve_gb_per_s=num_bytes / retrieve / 1e9,
        store=plain_store / store,
        retrieve=plain_retrieve / retrieve,
        lookup_tokens=lookup.num_tokens,
        lookup_s=lookup.seconds,
        lookup=bare.lookup_round_trip_s / lookup.seconds if bare else None,
        ping_trip_s=bare.ping_round_trip_s if bare else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Caller:
    """A registered cache and the client that makes calls with it."""

    client: Client
    cache: RankCacheMemory
    patterns: Sequence[Pattern]
    registration: RegisterKVCache
    chunk_bytes: int
    block_size: int


def measure_isolated_calls(
    caller: Caller, task: MeasureIsolatedCalls
) -> IsolatedCallTimes:
    """Store and retrieve new chunks, with a plain copy next to each call.

    Bytes are checked after every retrieve, outside the timed section.

    Raises:
        KVError: a call failed.
    """
    num_chunks = max(1, task.max_bytes // caller.chunk_bytes)
    return IsolatedCalls(caller, num_chunks, task.seed).measure(ROUNDS)


class IsolatedCalls:
    """Stores and retrieves of `num_chunks` chunks, in scattered or contiguous blocks.

    With `both`, each round also stores and retrieves concurrently.
    """

    def __init__(
        self,
        caller: Caller,
        num_chunks: int,
        seed: int,
        *,
        scattered: bool = True,
        both: bool = False,
    ) -> None:
        self.caller = caller
        self.both = both
        chunk_size = caller.client.chunk_size
        chunk_blocks = chunk_size // caller.block_size
        num_chunks = min(num_chunks, caller.cache.num_blocks(0) // chunk_blocks)
        self.num_bytes = num_chunks * caller.chunk_bytes
        rng = np.random.default_rng(seed)
        self.end = num_chunks * chunk_size
        self.tokens = rng.integers(VOCABULARY, size=self.end, dtype=np.uint32)
        orders = [
            rng.permutation(caller.cache.num_blocks(group))
            if scattered
            else np.arange(caller.cache.num_blocks(group))
            for group in range(len(caller.cache.groups))
        ]
        num_blocks = num_chunks * chunk_blocks
        self.blocks = [order[:num_blocks].astype(np.int32) for order in orders]
        self.other_blocks = [order[-num_blocks:].astype(np.int32) for order in orders]
        """Targets of a retrieve that is concurrent with a store of `blocks`."""
        self.seeds = rng.integers(1 << 63, size=num_chunks, dtype=np.uint64)
        self.spans: list[tuple[float, float]] = []
        """Begin and end of each call, on `perf_counter`."""
        for pattern, ids in zip(caller.patterns, self.blocks, strict=True):
            pattern.write(self.seeds, ids)

    def measure(
        self, rounds: int, begin: Callable[[], None] = lambda: None
    ) -> IsolatedCallTimes:
        """Measure `rounds` rounds; `begin` is called after the warm-up."""
        names = (*SAMPLES, *BOTH) if self.both else SAMPLES
        durations = {name: array("d") for name in names}
        num_wrong = 0
        for number in range(WARM_UP_ROUNDS + rounds):
            if number == WARM_UP_ROUNDS:
                begin()
                self.spans.clear()
            measured = self._round(number)
            num_wrong += self._count_wrong_bytes(self.blocks)
            if self.both:
                measured |= self._concurrent_round(number)
                num_wrong += self._count_wrong_bytes(self.other_blocks)
            if number >= WARM_UP_ROUNDS:
                for name, seconds in measured.items():
                    durations[name].append(seconds)
        return IsolatedCallTimes(
            self.num_bytes, LatencySamples.pack(durations), num_wrong
        )

    def _session(self, name: str, number: int) -> SessionKey:
        registration = self.caller.registration
        request = f"{name} {registration.instance_id} {number}"
        return SessionKey(registration.engine_id, request)

    def _round(self, number: int) -> dict[str, float]:
        """Store and retrieve once; the first token makes the prompt new."""
        client, cache = self.caller.client, self.caller.cache
        registration = self.caller.registration
        self.tokens[0] = VOCABULARY + number
        session, instance_id = self._session("alone", number), registration.instance_id
        arguments = (session, instance_id, 0, self.end, self.blocks, self.tokens)
        # The lookup sends the tokens, like a scheduler's.
        client.lookup(session, registration.model, registration.world_size, self.tokens)
        store = self._timed_call(lambda: client.store(*arguments))
        plain_store = _timed(lambda: cache.copy_out(number, self.num_bytes))
        self._poison(self.blocks)
        retrieve = self._timed_call(lambda: client.retrieve(*arguments))
        plain_retrieve = _timed(lambda: cache.copy_in(number, self.num_bytes))
        client.end_session(session)
        measured = (store, plain_store, retrieve, plain_retrieve)
        return dict(zip(SAMPLES, measured, strict=True))

    def _concurrent_round(self, number: int) -> dict[str, float]:
        """Store new tokens while the round's chunks are retrieved to other blocks."""
        client, cache = self.caller.client, self.caller.cache
        instance_id = self.caller.registration.instance_id
        first, second = (self._session(name, number) for name in BOTH)
        tokens = self.tokens.copy()
        tokens[1] = VOCABULARY
        retrieve = (first, instance_id, 0, self.end, self.other_blocks, self.tokens)
        store = (second, instance_id, 0, self.end, self.blocks, tokens)
        self._poison(self.other_blocks)

        def both() -> None:
            with ThreadPoolExecutor(1) as pool:
                stored = pool.submit(client.store, *store)
                client.retrieve(*retrieve)
                stored.result()

        duration_s = self._timed_call(both)
        plain_s = _timed(lambda: cache.copy_both(number, self.num_bytes))
        for session in (first, second):
            client.end_session(session)
        return dict(zip(BOTH, (duration_s, plain_s), strict=True))

    def _poison(self, blocks: Sequence[Indices]) -> None:
        for group, ids in enumerate(blocks):
            self.caller.cache.poison(group, ids)

    def _timed_call(self, call: Callable[[], object]) -> float:
        begun = perf_counter()
        duration_s = _timed(call)
        self.spans.append((begun, begun + duration_s))
        return duration_s

    def _count_wrong_bytes(self, blocks: Sequence[Indices]) -> int:
        return sum(
            pattern.count_wrong_bytes(self.seeds, ids)
            for pattern, ids in zip(self.caller.patterns, blocks, strict=True)
        )


def _timed(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun


def median_of(
    measure: Callable[[int], float], rounds: int, num_tokens: int
) -> IsolatedLookups:
    """Return the median of the durations that `measure(number)` returns."""
    seconds = np.array([measure(number) for number in range(rounds)])
    return IsolatedLookups(num_tokens, summarise(seconds).p50_s)
