"""Latency of single calls without load, beside plain copies of equal size.

Under load all processes compete for the cores, so the rate of a call relative to a
plain copy depends on how busy the machine is. After the load each rank makes the same
calls alone, each next to a plain copy of as many bytes in the same process.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from kvcore.keys import SessionKey
from kvctl.lab.ceilings import Ceilings
from kvctl.lab.latency import LatencySamples
from kvctl.lab.process_messages import CallTimes
from kvctl.lab.rank.registered_cache import RegisteredCache

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
    reports: Sequence[CallTimes],
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


class IsolatedCalls:
    """Stores and retrieves of `num_chunks` chunks, in scattered or contiguous blocks.

    With `both`, each round also stores and retrieves concurrently.
    """

    def __init__(
        self,
        registered: RegisteredCache,
        num_chunks: int,
        seed: int,
        *,
        scattered: bool = True,
        both: bool = False,
    ) -> None:
        self.registered = registered
        self.both = both
        sizes = [
            registered.cache.num_blocks(group)
            for group in range(len(registered.patterns))
        ]
        num_chunks = min(num_chunks, sizes[0] // registered.chunk_blocks)
        self.num_bytes = num_chunks * registered.chunk_bytes
        rng = np.random.default_rng(seed)
        self.end = num_chunks * registered.chunk_size
        self.tokens = rng.integers(VOCABULARY, size=self.end, dtype=np.uint32)
        orders = [
            rng.permutation(size) if scattered else np.arange(size) for size in sizes
        ]
        num_blocks = num_chunks * registered.chunk_blocks
        self.blocks = [order[:num_blocks].astype(np.int32) for order in orders]
        self.other_blocks = [order[-num_blocks:].astype(np.int32) for order in orders]
        """Targets of a retrieve that is concurrent with a store of `blocks`."""
        self.seeds = rng.integers(1 << 63, size=num_chunks, dtype=np.uint64)
        self.spans: list[tuple[float, float]] = []
        """Begin and end of each call, on `perf_counter`."""
        registered.write(self.seeds, self.blocks)

    def measure(
        self, rounds: int, begin: Callable[[], None] = lambda: None
    ) -> CallTimes:
        """Measure `rounds` rounds; `begin` is called after the warm-up.

        Bytes are checked after every retrieve, outside the timed section.

        Raises:
            KVError: a call failed.
        """
        names = (*SAMPLES, *BOTH) if self.both else SAMPLES
        durations = {name: array("d") for name in names}
        registered = self.registered
        num_wrong = 0
        for number in range(WARM_UP_ROUNDS + rounds):
            if number == WARM_UP_ROUNDS:
                begin()
                self.spans.clear()
            measured = self._round(number)
            num_wrong += registered.count_wrong_bytes(self.seeds, self.blocks)
            if self.both:
                measured |= self._concurrent_round(number)
                num_wrong += registered.count_wrong_bytes(self.seeds, self.other_blocks)
            if number >= WARM_UP_ROUNDS:
                for name, seconds in measured.items():
                    durations[name].append(seconds)
        samples = LatencySamples.pack(durations)
        return CallTimes(
            self.num_bytes, self.registered.chunk_bytes, samples, num_wrong
        )

    def _session(self, name: str, number: int) -> SessionKey:
        request = f"{name} {self.registered.instance_id} {number}"
        return SessionKey(self.registered.registration.engine_id, request)

    def _round(self, number: int) -> dict[str, float]:
        """Store and retrieve once; the first token makes the prompt new."""
        client, memory = self.registered.client, self.registered.cache
        registration = self.registered.registration
        self.tokens[0] = VOCABULARY + number
        session = self._session("alone", number)
        instance_id = self.registered.instance_id
        arguments = (session, instance_id, 0, self.end, self.blocks, self.tokens)
        # The lookup sends the tokens, like a scheduler's.
        client.lookup(session, registration.model, registration.world_size, self.tokens)
        store = self._timed_call(lambda: client.store(*arguments))
        plain_store = _timed(lambda: memory.copy_out(number, self.num_bytes))
        self.registered.poison(self.blocks)
        retrieve = self._timed_call(lambda: client.retrieve(*arguments))
        plain_retrieve = _timed(lambda: memory.copy_in(number, self.num_bytes))
        client.end_session(session)
        measured = (store, plain_store, retrieve, plain_retrieve)
        return dict(zip(SAMPLES, measured, strict=True))

    def _concurrent_round(self, number: int) -> dict[str, float]:
        """Store new tokens while the round's chunks are retrieved to other blocks."""
        client, memory = self.registered.client, self.registered.cache
        instance_id = self.registered.instance_id
        first, second = (self._session(name, number) for name in BOTH)
        tokens = self.tokens.copy()
        tokens[1] = VOCABULARY
        retrieve = (first, instance_id, 0, self.end, self.other_blocks, self.tokens)
        store = (second, instance_id, 0, self.end, self.blocks, tokens)
        self.registered.poison(self.other_blocks)

        def both() -> None:
            with ThreadPoolExecutor(1) as pool:
                stored = pool.submit(client.store, *store)
                client.retrieve(*retrieve)
                stored.result()

        duration_s = self._timed_call(both)
        plain_s = _timed(lambda: memory.copy_both(number, self.num_bytes))
        for session in (first, second):
            client.end_session(session)
        return dict(zip(BOTH, (duration_s, plain_s), strict=True))

    def _timed_call(self, call: Callable[[], object]) -> float:
        begun = perf_counter()
        duration_s = _timed(call)
        self.spans.append((begun, begun + duration_s))
        return duration_s


def _timed(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun
