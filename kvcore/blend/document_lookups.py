"""Document lookups: match a prompt, lease the chunks found, remember each result."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import msgspec

from kvcore.blend.document_index import DocumentIndex
from kvcore.blend.matchers import DocumentSpace, Matcher, TokenRun, read_tokens
from kvcore.engine.extension_interface import ExtensionInterface
from kvcore.engine.keyspace import Keyspace
from kvcore.engine.leases import LeaseNumber
from kvcore.engine.lookups import PendingLookup
from kvcore.engine.request_context import DeferredReply, RequestContext
from kvcore.errors import ChunksMissing, TokensNeeded
from kvcore.keys import ChunkHash, ScopedKey, SessionKey, scope_of
from kvcore.protocol import (
    CBLookupPreComputed,
    CBMatch,
    CBRange,
    CBRetrievePreComputed,
    Done,
)


class DocumentLeaseOwner(ScopedKey, frozen=True, array_like=True):
    """Owner of a session's lease on documents; the session owns that on its prefix."""


def document_lease_owner(key: SessionKey) -> DocumentLeaseOwner:
    """Return the owner of a session's lease on documents."""
    return DocumentLeaseOwner(key.engine_id, key.request_id, scope_of(key))


@dataclass(frozen=True, slots=True)
class FoundDocuments:
    """Result of a session's last lookup."""

    ranges: tuple[CBRange, ...] = ()
    matches: tuple[CBMatch, ...] = ()
    lease: LeaseNumber | None = None
    numbers: dict[int, int] = field(default_factory=dict)
    """Index in `matches` and in the lease, by position in the prompt."""

    def select(
        self, ranges: Sequence[CBRange], matches: Sequence[CBMatch], chunk_size: int
    ) -> list[int]:
        """Return the indexes of requested matches, and of all matches of ranges.

        Raises:
            ChunksMissing: the lookup did not find one of them.
        """
        numbers = []
        for match in matches:
            number = self.numbers.get(match.start)
            if number is None or self.matches[number] != match:
                raise ChunksMissing(
                    f"the session's lookup found no such chunk at token {match.start}"
                )
            numbers.append(number)
        for each in ranges:
            for start in range(each.start, each.end, chunk_size):
                number = self.numbers.get(start)
                if number is None or start + chunk_size > each.end:
                    raise ChunksMissing(
                        f"no chunk was found at token {start} of range "
                        f"{each.start} to {each.end}"
                    )
                numbers.append(number)
        return numbers


class DocumentLookups:
    """Finds and leases documents, and remembers each session's last result."""

    def __init__(
        self,
        engine: ExtensionInterface,
        matcher: Matcher,
        index: DocumentIndex,
        chunk_size: int,
    ) -> None:
        self._engine = engine
        self._matcher = matcher
        self._index = index
        self._chunk_size = chunk_size
        self._found: dict[SessionKey, FoundDocuments] = {}
        engine.on_session_end(self._end_session)

    def find(
        self,
        request: CBLookupPreComputed,
        context: RequestContext,
        make_reply: Callable[[FoundDocuments], msgspec.Struct],
        *,
        loads: bool = True,
    ) -> Generator[None, None, msgspec.Struct | DeferredReply]:
        """Answer a lookup, in steps, when L1 has all chunks that can be loaded.

        A lookup that is cancelled by its session's end or next lookup finds nothing.
        """
        model, world_size = request.model, request.world_size
        session, needs = self._engine.open_lookup(
            request.session, model, world_size, context
        )
        tokens = read_tokens(request.tokens, request.extras)
        space = DocumentSpace(model, world_size, self._chunk_size, request.extras)
        owner = document_lease_owner(session.key)
        lookup = PendingLookup(
            session, owner, space.owner(session.key), needs, context, loads
        )
        runs: list[TokenRun] = []

        def count_ready(hashes: list[ChunkHash]) -> int:
            return self._engine.lookups.count_present(hashes, needs)

        def search() -> Generator[None, None, None]:
            runs.extend((yield from self._matcher.find(tokens, space, count_ready)))
            lookup.runs = [run.hashes for run in runs]

        def finish(_: PendingLookup) -> msgspec.Struct:
            self._remove_missing(lookup)
            if lookup.cancelled:
                return make_reply(FoundDocuments())
            found = self._result(runs, lookup)
            self._found[session.key] = found
            for match in found.matches if self._index.num_in_tier else ():
                self._index.touch(ChunkHash(match.hash))
            return make_reply(found)

        return (yield from self._engine.lookups.run(lookup, finish, search()))

    def find_again(
        self, request: CBRetrievePreComputed, space: Keyspace, context: RequestContext
    ) -> Generator[None, None, FoundDocuments]:
        """Return the result of the session's last lookup, or of one more in L1.

        Raises:
            TokensNeeded: the session's lookup is unknown, and no prompt was sent.
        """
        if request.session not in self._found:
            if not request.tokens:
                raise TokensNeeded("no lookup of this session is known", have=0)
            again = CBLookupPreComputed(
                request.session,
                space.model,
                space.world_size,
                request.tokens,
                request.extras,
            )
            yield from self.find(again, context, lambda _: Done(), loads=False)
        return self._found.get(request.session, FoundDocuments())

    def _remove_missing(self, lookup: PendingLookup) -> None:
        """Remove the chunks that neither L1 nor a tier has from the index."""
        missing = [*chain.from_iterable(task.missing for task in lookup.tasks)]
        for key, chunk in zip(missing, self._engine.peek(missing), strict=True):
            if chunk is None:
                self._index.remove(key)

    def _result(
        self, runs: Sequence[TokenRun], lookup: PendingLookup
    ) -> FoundDocuments:
        """Return the leased chunks as ranges and matches, in the prompt's order."""
        size = self._chunk_size
        ranges: list[CBRange] = []
        matches: list[CBMatch] = []
        for run, chunks in zip(runs, lookup.held, strict=True):
            old_start, start = run.old_start, run.start
            for chunk in chunks:
                matches.append(CBMatch(old_start, start, chunk.hash))
                old_start, start = old_start + size, start + size
            if run.continues and ranges and ranges[-1].end == run.start:
                ranges[-1] = CBRange(ranges[-1].start, start)
            elif chunks:
                ranges.append(CBRange(run.start, start))
        numbers = {match.start: number for number, match in enumerate(matches)}
        return FoundDocuments(tuple(ranges), tuple(matches), lookup.lease, numbers)

    def note_read(
        self, key: SessionKey, found: FoundDocuments, numbers: Iterable[int], rank: int
    ) -> None:
        """Remove a rank from the readers of matches, if their lease is still live."""
        owner = document_lease_owner(key)
        for number in numbers:
            chunks = range(number, number + 1)
            self._engine.lookups.note_read(owner, found.lease, chunks, rank)

    def _end_session(self, key: SessionKey) -> None:
        found = self._found.pop(key, FoundDocuments())
        hashes = [ChunkHash(match.hash) for match in found.matches]
        self._engine.lookups.end(document_lease_owner(key), hashes)
