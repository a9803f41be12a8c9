"""Explanations of missed lookups: recent removals from L1, misses, expired leases.

Bounded: of each kind only the most recent records are kept.
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
from kvcore.storage.l1 import L1
from kvcore.storage.required_parts import RequiredParts

MAX_REMOVALS = 16_384
MAX_LOOKUPS = 4_096
HASH_DIGITS = 64
"""Hexadecimal digits of a whole chunk hash."""
MIN_KEY_DIGITS = 8
"""Fewest hexadecimal digits that name a chunk; a request's id may be shorter."""
SHOWN_DIGITS = 16
"""Digits in findings. Any client may ask, so no finding has the whole hash of a chunk:
with a secret salt a client knows it only if it knows the salt."""

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class ChunkRemoval:
    """The removal of a chunk from L1."""

    at: float
    reason: DropReason
    owner: SessionKey | None
    """The session whose store evicted it."""
    was_saved: bool
    """Whether a tier had all its parts."""


@dataclass(frozen=True, slots=True)
class MissRecord:
    """A lookup that hit fewer chunks than it named."""

    at: float
    num_chunks: int
    num_hits: int
    chunk: ChunkHash
    """The first chunk that was no hit."""
    have: tuple[PartName, ...]
    """Its parts that were in L1."""
    lacking: tuple[PartName, ...]
    tiers: str
    """Why no tier loaded it: a key of `_TIERS`; empty without tiers."""


@dataclass(frozen=True, slots=True)
class LeaseExpiry:
    """A lease that expired."""

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
    """Bounded memory of removeds, misses and expiries."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._removals: OrderedDict[ChunkHash, ChunkRemoval] = OrderedDict()
        self._misses: OrderedDict[SessionKey, MissRecord] = OrderedDict()
        self._expiries: OrderedDict[SessionKey, LeaseExpiry] = OrderedDict()

    # -- records ----------------------------------------------------------------------

    def note_removal(self, removal: Removal) -> None:
        """Record that a chunk was removed from L1."""
        chunk = removal.chunk
        was_saved = not chunk.ready & ~chunk.saved
        removed = ChunkRemoval(self._clock(), removal.reason, removal.owner, was_saved)
        _put(self._removals, chunk.hash, removed, MAX_REMOVALS)

    def note_miss(
        self,
        session: SessionKey,
        hashes: Sequence[ChunkHash],
        num_hits: int,
        first: Chunk | None,
        needs: RequiredParts,
        tiers: str,
    ) -> None:
        """Record that of `hashes` only the first `num_hits` were a hit.

        `first` is the next chunk, if L1 has any part of it.
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
        """Record that a session's lease expired."""
        expiry = LeaseExpiry(self._clock(), num_chunks, age_s)
        _put(self._expiries, session, expiry, MAX_LOOKUPS)

    # -- findings ---------------------------------------------------------------------

    def explain(self, about: str, l1: L1) -> tuple[Finding, ...]:
        """Return all findings about a request, or a chunk by 8 or more hash digits."""
        findings = [*self.why_request(about)]
        if len(about) >= MIN_KEY_DIGITS and not set(about) - set("0123456789abcdef"):
            findings += self.why_chunk(about)
            findings += _list_parts(l1.peek(self._chunks(about)))
        return tuple(findings) or (
            Finding(
                "unknown",
                "no missed lookup and no removed chunk has that name",
            ),
        )

    def why_request(self, name: str) -> Iterator[Finding]:
        """Explain a request, named by its id or ENGINE/REQUEST; latest first."""
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
        """Explain the chunks whose hashes begin with these hexadecimal digits."""
        for key, removed in reversed([*self._removals.items()]):
            if key.hex().startswith(digits):
                yield self._describe_removal(key, removed)
        for session, miss in reversed([*self._misses.items()]):
            if miss.chunk.hex().startswith(digits):
                yield self._describe_miss(session, miss)
                yield from self._explain(miss)

    def _chunks(self, digits: str) -> list[ChunkHash]:
        """Return the recorded chunks that the digits name, or the one named in full."""
        if len(digits) == HASH_DIGITS:
            return [ChunkHash(bytes.fromhex(digits))]
        recorded = {*self._removals, *(miss.chunk for miss in self._misses.values())}
        return [key for key in recorded if key.hex().startswith(digits)]

    def _describe_miss(self, session: SessionKey, miss: MissRecord) -> Finding:
        return Finding(
            "missed",
            f"lookup {session.engine_id}/{session.request_id}, {self._ago(miss.at)}: "
            f"{miss.num_hits} of {miss.num_chunks} chunks; the next one is "
            f"{_show(miss.chunk)}",
        )

    def _explain(self, miss: MissRecord) -> Iterator[Finding]:
        if miss.tiers:
            yield Finding(f"tier_{miss.tiers}", _TIERS[miss.tiers])
        if miss.have:
            yield from _compare(miss)
            return
        removed = self._removals.get(miss.chunk)
        if removed is not None and removed.at <= miss.at:
            yield self._describe_removal(miss.chunk, removed)
        elif removed is None:
            yield Finding(
                "never_stored",
                "no record of a store since this server started",
            )
        else:
            yield Finding("stored_later", "not stored at that time, but later")

    def _describe_removal(self, key: ChunkHash, removed: ChunkRemoval) -> Finding:
        words = {
            DropReason.EVICTED: "evicted",
            DropReason.CLEARED: "dropped by CLEAR",
            DropReason.CORRUPT: "dropped: its bytes did not match their checksum",
        }
        owner = removed.owner
        whom = f" for {owner.engine_id}/{owner.request_id}" if owner else ""
        saved = "" if removed.was_saved else "; no tier had it"
        return Finding(
            removed.reason.value,
            f"chunk {_show(key)} was {words[removed.reason]}"
            f"{whom} {self._ago(removed.at)}{saved}",
        )

    def _ago(self, at: float) -> str:
        return f"{self._clock() - at:.1f} s ago"


def _compare(miss: MissRecord) -> Iterator[Finding]:
    """Explain a chunk of which L1 had only some parts."""
    have = {(name.rank, name.group): name.layout for name in miss.have}
    for name in miss.lacking:
        what = f"rank {name.rank}'s part of group {name.group}"
        other = have.get((name.rank, name.group))
        if other is None:
            yield Finding("not_all_ranks", f"{what} was not in L1")
        else:
            yield Finding(
                "other_layout",
                f"{what} was in L1 in layout {other}, the lookup needs {name.layout}",
            )


def _list_parts(chunks: Sequence[Chunk | None]) -> list[Finding]:
    """Describe the parts of a chunk that L1 knows."""
    return [
        Finding(
            "present" if chunk.ready >> number & 1 else "being_written",
            f"rank {part.name.rank}'s part of group {part.name.group}, layout "
            f"{part.name.layout}, {part.num_bytes} bytes, {chunk.holds} holds",
        )
        for chunk in chunks
        if chunk is not None
        for number, part in [*chunk.parts.items()]
        if part.name is not None
    ]


def _show(key: ChunkHash) -> str:
    return key.hex()[:SHOWN_DIGITS]


def _is_named(session: SessionKey, name: str) -> bool:
    return name in (session.request_id, f"{session.engine_id}/{session.request_id}")


def _put(kept: OrderedDict[K, V], key: K, value: V, limit: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > limit:
        kept.popitem(last=False)
