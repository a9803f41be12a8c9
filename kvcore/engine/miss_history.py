"""Why a lookup missed: what left L1 lately, and where lookups first missed.

Bounded: of each kind the most recent ones are kept, and what is older is not known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

from kvcore.keys import ChunkHash, SessionKey
from kvcore.protocol import Finding
from kvcore.storage.chunk import Chunk, DropReason, PartName, Removal
from kvcore.storage.required_parts import RequiredParts

MAX_DEPARTURES = 16_384
MAX_LOOKUPS = 4_096
HASH_DIGITS = 64
"""Of a whole chunk hash, in hexadecimal."""
MIN_KEY_DIGITS = 8
"""Hexadecimal digits that a chunk may be named by; a request's id may be shorter."""

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class ChunkRemoval:
    """A chunk left L1."""

    at: float
    reason: DropReason
    owner: SessionKey | None
    """For whom room was made."""
    was_saved: bool
    """A tier had all of it."""


@dataclass(frozen=True, slots=True)
class MissRecord:
    """A lookup found less than it asked for."""

    at: float
    num_chunks: int
    num_hits: int
    chunk: ChunkHash
    """The first one that was no hit."""
    have: tuple[PartName, ...]
    """Parts of it that were there."""
    lacking: tuple[PartName, ...]
    tiers: str
    """What became of the attempt to load it: a code of `_TIERS`, or empty."""


@dataclass(frozen=True, slots=True)
class LeaseExpiry:
    """A lease ended because its time was up."""

    at: float
    num_chunks: int
    age_s: float


_TIERS = {
    "failed": "a tier failed",
    "late": "the tiers had not answered in time",
    "refused": "too many other lookups were loading",
    "missing": "no tier had it",
}


class MissHistory:
    """Bounded memory of departures, misses and expiries."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._departures: OrderedDict[ChunkHash, ChunkRemoval] = OrderedDict()
        self._misses: OrderedDict[SessionKey, MissRecord] = OrderedDict()
        self._expiries: OrderedDict[SessionKey, LeaseExpiry] = OrderedDict()

    # -- taking note ------------------------------------------------------------------

    def note_removal(self, removal: Removal) -> None:
        """Note that a chunk left L1."""
        chunk = removal.chunk
        was_saved = not chunk.ready & ~chunk.saved
        departure = ChunkRemoval(
            self._clock(), removal.reason, removal.owner, was_saved
        )
        _put(self._departures, chunk.hash, departure, MAX_DEPARTURES)

    def note_miss(
        self,
        session: SessionKey,
        hashes: Sequence[ChunkHash],
        num_hits: int,
        first: Chunk | None,
        needs: RequiredParts,
        tiers: str,
    ) -> None:
        """Note that of `hashes` only the first `num_hits` were a hit.

        `first` is what L1 knows of the next one.
        """
        ready = first.ready if first else 0
        parts = [*first.parts.items()] if first else []
        have = (place.name for part, place in parts if ready >> part & 1)
        lacking = (need.name for need in needs.parts if not ready >> need.part & 1)
        miss = MissRecord(
            self._clock(),
            len(hashes),
            num_hits,
            hashes[num_hits],
            tuple(name for name in have if name is not None),
            tuple(lacking),
            tiers,
        )
        _put(self._misses, session, miss, MAX_LOOKUPS)

    def note_expired(self, session: SessionKey, num_chunks: int, age_s: float) -> None:
        """Note that a session's lease expired."""
        expiry = LeaseExpiry(self._clock(), num_chunks, age_s)
        _put(self._expiries, session, expiry, MAX_LOOKUPS)

    # -- answering --------------------------------------------------------------------

    def why_request(self, name: str) -> Iterator[Finding]:
        """Explain a request, named by its id or as ENGINE/REQUEST; latest first."""
        for session, miss in reversed([*self._misses.items()]):
            if _is_named(session, name):
                yield self._describe_miss(session, miss)
                yield from self._explain(miss)
        for session, expiry in reversed([*self._expiries.items()]):
            if _is_named(session, name):
                yield Finding(
                    "expired",
                    f"its lease on {expiry.num_chunks} chunks expired unread after "
                    f"{expiry.age_s:.1f} s, {self._ago(expiry.at)}",
                )

    def why_chunk(self, digits: str) -> Iterator[Finding]:
        """Explain the chunks whose hash begins with these hexadecimal digits."""
        for key, departure in reversed([*self._departures.items()]):
            if key.hex().startswith(digits):
                yield self._describe_departure(key, departure)
        for session, miss in reversed([*self._misses.items()]):
            if miss.chunk.hex().startswith(digits):
                yield self._describe_miss(session, miss)
                yield from self._explain(miss)

    def _describe_miss(self, session: SessionKey, miss: MissRecord) -> Finding:
        return Finding(
            "missed",
            f"lookup {session.engine_id}/{session.request_id}, {self._ago(miss.at)}: "
            f"{miss.num_hits} of {miss.num_chunks} chunks; the next one is "
            f"{miss.chunk.hex()}",
        )

    def _explain(self, miss: MissRecord) -> Iterator[Finding]:
        if miss.tiers:
            yield Finding(f"tier_{miss.tiers}", _TIERS[miss.tiers])
        if miss.have:
            yield from _compare(miss)
            return
        departure = self._departures.get(miss.chunk)
        if departure is not None and departure.at <= miss.at:
            yield self._describe_departure(miss.chunk, departure)
        elif departure is None:
            yield Finding(
                "never_stored",
                "not stored since this server started, as far as it remembers",
            )
        else:
            yield Finding("stored_later", "not stored yet then; it was later on")

    def _describe_departure(self, key: ChunkHash, departure: ChunkRemoval) -> Finding:
        words = {
            DropReason.EVICTED: "evicted",
            DropReason.CLEARED: "dropped by CLEAR",
            DropReason.CORRUPT: "dropped, as its bytes were wrong",
        }
        owner = departure.owner
        whom = f" for {owner.engine_id}/{owner.request_id}" if owner else ""
        saved = "" if departure.was_saved else ", no tier having it"
        return Finding(
            departure.reason.value,
            f"chunk {key.hex()[:16]} was {words[departure.reason]}"
            f"{whom} {self._ago(departure.at)}{saved}",
        )

    def _ago(self, at: float) -> str:
        return f"{self._clock() - at:.1f} s ago"


def _compare(miss: MissRecord) -> Iterator[Finding]:
    """Explain a chunk of which some parts were there and others not."""
    have = {(name.rank, name.group): name.layout for name in miss.have}
    for name in miss.lacking:
        what = f"rank {name.rank}'s part of group {name.group}"
        other = have.get((name.rank, name.group))
        if other is None:
            yield Finding("not_all_ranks", f"{what} was not there")
        else:
            yield Finding(
                "other_layout",
                f"{what} was there in layout {other} only; asked for is {name.layout}",
            )


def _is_named(session: SessionKey, name: str) -> bool:
    return name in (session.request_id, f"{session.engine_id}/{session.request_id}")


def _put(kept: OrderedDict[K, V], key: K, value: V, limit: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > limit:
        kept.popitem(last=False)
