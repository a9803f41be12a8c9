"""State machine of blend requests, interleaved step by step.

Only rules advance requests: slices, copies, tier replies and ends occur in any order,
between evictions, ended sessions and lost workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvcore.blend.blend_engine import slot_rows
from kvcore.blend.document_lookups import (
    DocumentLeaseOwner,
    FoundDocuments,
    document_lease_owner,
)
from kvcore.config import WritePolicy
from kvcore.errors import (
    BadRequest,
    ChunksMissing,
    DeadlineExceeded,
    KVError,
    TokensNeeded,
    UnknownInstance,
    UnknownModel,
)
from kvcore.keys import ChunkHash, SessionKey
from kvcore.protocol import (
    CBLookupPreComputed,
    CBLookupReply,
    CBMatch,
    CBRange,
    CBRetrievePreComputed,
    CBStoreFinal,
    CBStorePreComputed,
    CBUnregisterKVCache,
    Clear,
    EndSession,
    Lookup,
    Retrieve,
)
from tests.blend.blend_fixture import BlendFixture
from tests.blend.blend_model import (
    END,
    MODEL,
    PART_BYTES,
    SIZE,
    SLOTS,
    START,
    Operation,
    extras_of,
    packed,
)

CHUNKS = [(1, 1, 1, 1), (1, 2, 1, 2), (2, 1, 2, 1), (3, 1, 1, 1)]
"""Few, and similar at odd offsets: documents share and repeat them."""
MOST_TOKENS = 40

documents = st.builds(
    lambda chunks, tail: (*(token for chunk in chunks for token in chunk), *tail),
    st.lists(st.sampled_from(CHUNKS), min_size=1, max_size=5),
    st.lists(st.integers(1, 3), max_size=SIZE - 1),
)
glue = st.sampled_from([(START,), (START,), (), (END,), (2,), (3, 1, START), (3,) * 5])
salts = st.sampled_from([""] * 5 + ["tenant"])
KEYS = [SessionKey("e", name) for name in "12"]
sessions = st.sampled_from(KEYS)
at_once = st.booleans()
deadlines = st.sampled_from([0.0] * 4 + [1.0, 40.0])
"""Seconds from now; 0 is none."""
rarely = st.sampled_from([False, False, False, True])
offsets = st.sampled_from([0, 0, 1, 20, SLOTS - 16])
Tokens = tuple[int, ...]

LEASE_S = 60
QUOTAS = [
    {"salt:tenant": PART_BYTES},
    {"salt:tenant": 3 * PART_BYTES, f"model:{MODEL}": 4 * PART_BYTES},
]
RANKS = {1: [(0,)], 2: [(0, 1), (0, 1), (1, 0), (1,)]}
UPSETS = {
    "unregister",
    "register",
    "lose",
    "clear",
    "wait",
    "hurry",
    "spoil",
    "restart",
}
HANDLERS = {
    "store": "cb_store_pre_computed",
    "final": "cb_store_final",
    "lookup": "cb_lookup_pre_computed",
    "prefix": "lookup",
    "retrieve": "cb_retrieve_pre_computed",
    "retrieve_prefix": "retrieve",
}


@dataclass
class Lease:
    """A session's matches, and the ranks that have not yet read each of them."""

    found: FoundDocuments
    client: str
    deadline: float
    waiting: dict[int, set[int]] = field(default_factory=dict)


NO_LEASE = object()


class BlendMachine(RuleBasedStateMachine):
    """The model: the tokens of each stored chunk, and the lease of each session."""

    matcher: str

    def __init__(self) -> None:
        super().__init__()
        self.documents: list[Tokens] = []
        self.prefixes: list[tuple[Tokens, str]] = []
        self.leases: dict[SessionKey, Lease] = {}
        self.known: dict[SessionKey, FoundDocuments] = {}
        self.prompts: dict[SessionKey, tuple[Tokens, str]] = {}
        """Prompt and salt of each session's last lookup."""

    @initialize(
        num_pages=st.sampled_from([4, 9, 40]),
        num_tiers=st.sampled_from([0, 1, 1, 2]),
        world_size=st.sampled_from([1, 1, 2]),
        policy=st.sampled_from(get_args(WritePolicy)),
        max_jobs=st.sampled_from([1, 100, 100]),
        max_tier_chunks=st.sampled_from([2, 1000]),
        collide=st.booleans(),
        keep=st.sampled_from(["", "", "index", "l1"]),
        quotas=st.sampled_from([{}, {}, *QUOTAS]),
        first=st.lists(documents, min_size=1, max_size=3),
    )
    def build(self, first: list[Tokens], **options: Any) -> None:
        """Build a small L1, with or without tiers, a good or a weak rolling hash."""
        has_index = self.matcher != "separated" and options["num_tiers"]
        if options["keep"] == "index" and not has_index:
            options["keep"] = ""
        self.fixture = BlendFixture(self.matcher, **options)
        self.fixture.on_step = self.on_step
        for tokens in first:
            self.put(tokens, "", 0, None, RANKS[self.fixture.world_size][0], now=True)

    # -- requests of engines -----------------------------------------------------------

    @rule(
        data=st.data(),
        tokens=documents,
        salt=salts,
        offset=offsets,
        image=st.sampled_from([None] * 5 + [5]),
        now=at_once,
        wait_s=deadlines,
    )
    def store(
        self,
        data: st.DataObject,
        tokens: Tokens,
        salt: str,
        offset: int,
        image: int | None,
        now: bool,
        wait_s: float,
    ) -> None:
        """All ranks store a document, or only one."""
        ranks = data.draw(st.sampled_from(RANKS[self.fixture.world_size]))
        self.put(tokens, salt, offset, image, ranks, now=now, wait_s=wait_s)

    @rule(data=st.data(), key=sessions, salt=salts, now=at_once, wait_s=deadlines)
    def store_final(
        self, data: st.DataObject, key: SessionKey, salt: str, now: bool, wait_s: float
    ) -> None:
        """Ranks store a computed prompt as a prefix."""
        tokens = self.prompt(data)
        self.prefixes.append((tokens, salt))
        end = data.draw(st.sampled_from([0, 7, len(tokens), len(tokens)]))
        end = min(end, len(tokens))
        start = data.draw(st.sampled_from([0, 0, 0, end // 2 // SIZE * SIZE]))
        for rank in data.draw(st.sampled_from(RANKS[self.fixture.world_size])):
            self.fixture.learn(tokens[:end], salt, is_document=False)
            request = CBStoreFinal(
                key, f"i{rank}", 1, start, end, packed(tokens), 0, extras_of(salt)
            )
            self.begin("final", request, now, wait_s=wait_s, rank=rank, session=key)

    @rule(data=st.data(), key=sessions, salt=salts, now=at_once, wait_s=deadlines)
    def look_up(
        self, data: st.DataObject, key: SessionKey, salt: str, now: bool, wait_s: float
    ) -> None:
        """A scheduler looks for documents."""
        tokens = self.prompt(data)
        image = data.draw(st.sampled_from([None] * 5 + [7]))
        request = CBLookupPreComputed(
            key,
            MODEL,
            self.fixture.world_size,
            packed(tokens),
            extras_of(salt, image),
        )
        read = tokens if image is None else tokens[:image]
        expected = self.search(read, salt) if now and self.is_searched() else None
        operation = self.begin(
            "lookup", request, now, wait_s=wait_s, tokens=read, salt=salt, session=key
        )
        for earlier in self.fixture.operations if operation.error is None else ():
            alike = earlier.kind == "lookup" and earlier.session == key
            earlier.is_void |= alike and earlier is not operation
        if expected is not None:
            assert [match.start for match in operation.reply.matches] == expected

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data(), key=sessions, now=at_once, wait_s=deadlines)
    def look_up_prefix(
        self, data: st.DataObject, key: SessionKey, now: bool, wait_s: float
    ) -> None:
        """A scheduler looks for a prefix."""
        tokens, salt = self.prefix(data)
        extras = extras_of(salt)
        request = Lookup(
            key,
            MODEL,
            self.fixture.world_size,
            len(tokens),
            packed(tokens),
            0,
            extras,
        )
        self.begin(
            "prefix", request, now, wait_s=wait_s, tokens=tokens, salt=salt, session=key
        )

    @precondition(lambda self: self.known)
    @rule(
        data=st.data(),
        offset=offsets,
        now=at_once,
        wait_s=deadlines,
        again=st.booleans(),
        rotate_keys=st.booleans(),
    )
    def retrieve(
        self,
        data: st.DataObject,
        offset: int,
        now: bool,
        wait_s: float,
        again: bool,
        rotate_keys: bool,
    ) -> None:
        """A worker retrieves its session's lookup result, as ranges or as chunks."""
        key = data.draw(st.sampled_from(sorted(self.known, key=str)))
        found = self.known[key]
        rank = data.draw(st.integers(0, self.fixture.world_size - 1))
        ranges: tuple[CBRange, ...] = ()
        matches: tuple[CBMatch, ...] = ()
        if data.draw(st.booleans()):
            ranges = found.ranges
            if ranges and data.draw(st.booleans()):
                one = data.draw(st.sampled_from(ranges))
                ranges = (CBRange(one.start, one.end - SIZE), CBRange(0, SIZE))[:1]
        else:
            some = data.draw(st.lists(st.booleans(), max_size=12))
            matches = tuple(m for m, b in zip(found.matches, some, strict=False) if b)
        tokens, salt = self.prompts.get(key, ((), ""))
        request = CBRetrievePreComputed(
            key,
            f"i{rank}",
            offset,
            ranges,
            matches,
            tokens=packed(tokens if again else ()),
            extras=extras_of(salt),
            rotate_keys=rotate_keys,
        )
        self.begin(
            "retrieve",
            request,
            now,
            wait_s=wait_s,
            rank=rank,
            tokens=tokens,
            salt=salt,
            session=key,
        )

    @precondition(lambda self: self.fixture.texts)
    @rule(
        data=st.data(),
        key=sessions,
        offset=offsets,
        rotate_keys=st.booleans(),
        now=at_once,
        wait_s=deadlines,
    )
    def retrieve_any(
        self,
        data: st.DataObject,
        key: SessionKey,
        offset: int,
        now: bool,
        rotate_keys: bool,
        wait_s: float,
    ) -> None:
        """A worker requests chunks that no lookup returned, present or not."""
        known = sorted(self.fixture.texts)
        hashes = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        starts = data.draw(
            st.lists(st.integers(0, 20), min_size=len(hashes), max_size=len(hashes))
        )
        matches = tuple(
            CBMatch(0, start, key) for start, key in zip(starts, hashes, strict=True)
        )
        rank = data.draw(st.integers(0, self.fixture.world_size - 1))
        request = CBRetrievePreComputed(
            key, f"i{rank}", offset, (), matches, rotate_keys=rotate_keys
        )
        self.begin("retrieve", request, now, wait_s=wait_s, rank=rank, session=key)

    @precondition(lambda self: self.prefixes)
    @rule(data=st.data(), key=sessions, now=at_once, wait_s=deadlines)
    def retrieve_prefix(
        self, data: st.DataObject, key: SessionKey, now: bool, wait_s: float
    ) -> None:
        """A worker reads a prefix into the same buffer."""
        tokens, salt = self.prefix(data)
        rank = data.draw(st.integers(0, self.fixture.world_size - 1))
        end = len(tokens) - len(tokens) % SIZE
        blocks = slot_rows([3], end).astype("<i4").data.cast("B") if end else b""
        request = Retrieve(
            key,
            f"i{rank}",
            0,
            end,
            (memoryview(blocks),),
            0,
            packed(tokens),
            0,
            extras_of(salt),
        )
        self.begin(
            "retrieve_prefix", request, now, wait_s=wait_s, rank=rank, session=key
        )

    # -- other events ------------------------------------------------------------------

    @precondition(lambda self: self.fixture.operations)
    @rule(data=st.data(), steps=st.integers(1, 4))
    def go_on(self, data: st.DataObject, steps: int) -> None:
        """Pending requests take steps, in any order."""
        for _ in range(steps):
            if self.fixture.operations:
                operation = data.draw(st.sampled_from(self.fixture.operations))
                self.fixture.advance(operation)

    @rule(key=sessions)
    def end_session(self, key: SessionKey) -> None:
        """A session ends, with any of its requests pending."""
        self.fixture.engine.end_session(EndSession(key), self.fixture.caller("s"))
        self.leases.pop(key, None)
        self.known.pop(key, None)
        for operation in self.fixture.operations:
            operation.is_void |= operation.session == key

    @rule(data=st.data(), what=st.sampled_from(sorted(UPSETS)))
    def upset(self, data: st.DataObject, what: str) -> None:
        """A rare event occurs."""
        getattr(self, what)(data)

    def unregister(self, data: st.DataObject) -> None:
        """A buffer is unregistered and usually registered again; queued copies fail."""
        rank = data.draw(st.integers(0, self.fixture.world_size - 1))
        request = CBUnregisterKVCache(f"i{rank}")
        try:
            running = self.fixture.blend.cb_unregister_kv_cache(
                request, self.fixture.caller(f"w{rank}")
            )
        except UnknownInstance:
            assert self.fixture.instance(rank) is None
        else:
            running.future.result(20)
            running.finish()
        if not data.draw(rarely):
            self.fixture.register(rank)

    def register(self, data: st.DataObject) -> None:
        """A buffer is registered, or replaced."""
        self.fixture.register(data.draw(st.integers(0, self.fixture.world_size - 1)))

    def lose(self, data: st.DataObject) -> None:
        """A process ends: no further slice of its requests runs."""
        fixture = self.fixture
        client = data.draw(st.sampled_from(["s", "w0", "w1"]))
        for operation in [each for each in fixture.operations if each.client == client]:
            operation.is_void = True
            if operation.steps is not None:
                operation.steps.close()
                fixture.operations.remove(operation)
        for rank in range(fixture.world_size):
            if client == f"w{rank}" and fixture.instance(rank):
                for lease in self.leases.values():
                    for ranks in lease.waiting.values():
                        ranks.discard(rank)
        fixture.engine.end_client(client)
        fixture.await_closed()
        for key in [k for k, each in self.leases.items() if each.client == client]:
            del self.leases[key]
        # A session ends with the last of its clients.
        find = fixture.engine.sessions.find
        self.known = {key: found for key, found in self.known.items() if find(key)}
        self.leases = {key: one for key, one in self.leases.items() if find(key)}
        for rank in range(fixture.world_size):
            if client == f"w{rank}" and not data.draw(rarely):
                fixture.register(rank)

    def restart(self, data: st.DataObject) -> None:
        """The server ends and another starts; most ranks register again."""
        self.fixture.restart()
        self.leases.clear()
        self.known.clear()
        for rank in range(self.fixture.world_size):
            if not data.draw(rarely):
                self.fixture.register(rank)

    def clear(self, _: st.DataObject) -> None:
        """A client clears L1."""
        for _ in self.fixture.engine.clear(Clear(), self.fixture.caller("s")):
            pass

    def wait(self, data: st.DataObject) -> None:
        """Leases expire, then sessions."""
        self.fixture.now += data.draw(st.sampled_from([2, 30, 61, 601]))
        self.fixture.engine.expire()
        now = self.fixture.now
        for key in [k for k, each in self.leases.items() if each.deadline <= now]:
            del self.leases[key]
        for key in list(self.known):
            if self.fixture.engine.sessions.find(key) is None:
                del self.known[key]

    @precondition(lambda self: any(tier.pending for tier in self.fixture.tiers))
    @rule(data=st.data(), well=st.sampled_from([True, True, True, False]))
    def answer(self, data: st.DataObject, well: bool) -> None:
        """A call of a tier succeeds or fails."""
        tiers = [tier for tier in self.fixture.tiers if tier.pending]
        tier = data.draw(st.sampled_from(tiers))
        tier.answer(data.draw(st.integers(0, len(tier.pending) - 1)), well=well)

    @rule()
    def run_due(self) -> None:
        """The tiers' thread runs the calls posted to it."""
        self.fixture.coordinator.run_due()

    @precondition(lambda self: self.fixture.tiers)
    @rule(forget=st.booleans())
    def save(self, forget: bool) -> None:
        """Tiers complete all calls; then L1 may drop all chunks."""
        self.fixture.answer_tiers()
        if forget:
            self.fixture.l1.drop(self.fixture.l1.hashes())

    def hurry(self, _: st.DataObject) -> None:
        """Lookups that wait for tiers reach their deadline."""
        self.fixture.coordinator.run_due()
        self.fixture.coordinator.ahead = 1000.0
        self.fixture.coordinator.run_due()
        self.fixture.coordinator.ahead = 0.0

    def spoil(self, data: st.DataObject) -> None:
        """A tier evicts a part, or will return wrong bytes for it."""
        tiers = [tier for tier in self.fixture.tiers if tier.kept]
        if not tiers:
            return
        tier = data.draw(st.sampled_from(tiers))
        key = data.draw(st.sampled_from(sorted(tier.kept)))
        if data.draw(st.booleans()):
            del tier.kept[key]
        else:
            tier.wrong.add(key)

    # -- the model ---------------------------------------------------------------------

    def prompt(self, data: st.DataObject) -> Tokens:
        """Draw a prompt: glue, documents, and pieces of them."""
        tokens: Tokens = ()
        for _ in range(data.draw(st.integers(1, 3))):
            tokens += data.draw(glue)
            if self.documents:
                document = data.draw(st.sampled_from(self.documents))
                first = data.draw(st.sampled_from([0, 0, 0, SIZE, 3]))
                tokens += document[first : data.draw(st.sampled_from([99, 99, 10]))]
        return tokens[:MOST_TOKENS]

    def prefix(self, data: st.DataObject) -> tuple[Tokens, str]:
        """Draw a prompt that was stored with its salt, or another."""
        tokens, salt = data.draw(st.sampled_from(self.prefixes))
        if data.draw(rarely):
            return tokens[: 2 * SIZE] + self.prompt(data), data.draw(salts)
        return tokens, salt

    def put(
        self,
        tokens: Tokens,
        salt: str,
        offset: int,
        image: int | None,
        ranks: tuple[int, ...],
        *,
        now: bool,
        wait_s: float = 0.0,
    ) -> None:
        """Have ranks store a document."""
        self.documents.append(tokens)
        self.fixture.learn(tokens[:image], salt, is_document=True)
        for rank in ranks:
            request = CBStorePreComputed(
                f"i{rank}", offset, packed(tokens), extras_of(salt, image)
            )
            self.begin(
                "store",
                request,
                now,
                wait_s=wait_s,
                rank=rank,
                tokens=tokens,
                salt=salt,
            )

    def begin(
        self, kind: str, request: Any, now: bool, wait_s: float, **named: Any
    ) -> Operation:
        """Begin a request; take its first step, or all of them."""
        fixture = self.fixture
        rank = named.pop("rank", None)
        operation = Operation(kind, "s" if rank is None else f"w{rank}", None, **named)
        operation.request = request
        operation.deadline = fixture.now + wait_s if wait_s else 0.0
        operation.instance = None if rank is None else fixture.instance(rank)
        handler = HANDLERS[kind]
        owner = fixture.blend if hasattr(fixture.blend, handler) else fixture.engine
        fixture.begin(getattr(owner, handler), operation)
        fixture.advance(operation)
        if now:
            fixture.drive(operation)
        return operation

    def on_step(self, operation: Operation) -> None:
        """Check the result of a request's step."""
        if operation.error is not None:
            assert self.is_due(operation, operation.error), operation.error
        key = operation.session
        found = self.fixture.blend.lookups._found.get(key) if key else None
        if found is not None and found is not self.known.get(key):
            assert not operation.is_void
            self.note(operation, found)
        if operation.running and not operation.lease and not operation.is_void:
            operation.lease = self.leases.get(key, NO_LEASE)
            if operation.kind == "retrieve":
                told = {match.hash for match in self.known[key].matches}
                assert told.issuperset(operation.copied)
        if not operation.is_over or operation.error is not None:
            return
        if operation.kind == "lookup":
            self.check_told(operation, operation.reply)
            assert not (operation.is_void and operation.reply.matches)
            assert operation.reply.num_tokens == SIZE * len(operation.reply.matches)
        elif operation.kind == "retrieve":
            self.read(operation)
        elif operation.kind == "prefix":
            hashes = self.fixture.hashes(
                operation.tokens, operation.salt, is_document=False
            )
            assert self.fixture.texts.keys() >= {*hashes[: operation.reply.num_chunks]}

    def is_due(self, operation: Operation, error: KVError) -> bool:
        """Return whether this error is correct for the request."""
        fixture, request = self.fixture, operation.request
        if isinstance(error, UnknownModel):
            return not fixture.needs()
        if isinstance(error, UnknownInstance):
            instance = operation.instance
            return instance is None or not fixture.engine.registry.has(instance)
        if isinstance(error, DeadlineExceeded):
            return 0 < operation.deadline < fixture.now
        if isinstance(error, ChunksMissing):  # `BlendFixture.copy` checks it.
            return operation.kind in ("retrieve", "retrieve_prefix")
        if isinstance(error, TokensNeeded):
            return operation.kind == "retrieve" and operation.session not in self.known
        if isinstance(error, BadRequest) and operation.kind == "store":
            return request.offset + len(operation.tokens) > SLOTS
        if isinstance(error, BadRequest) and operation.kind == "retrieve":
            return self.is_wrong(request)
        return False

    def is_wrong(self, request: CBRetrievePreComputed) -> bool:
        """Return whether target slots overlap or exceed the buffer."""
        starts = sorted(match.start for match in request.matches)
        starts += [each.end - SIZE for each in request.ranges]
        twice = any(b - a < SIZE for a, b in pairwise(starts))
        return twice or request.offset + max(starts) + SIZE > SLOTS

    def note(self, operation: Operation, found: FoundDocuments) -> None:
        """Record a lookup's result and lease."""
        key = operation.session
        self.known[key] = found
        self.prompts[key] = (operation.tokens, operation.salt)
        self.check_told(operation, found)
        self.leases.pop(key, None)
        if found.matches:
            ranks = range(self.fixture.world_size)
            waiting = {number: {*ranks} for number in range(len(found.matches))}
            deadline = self.fixture.now + LEASE_S
            self.leases[key] = Lease(found, operation.client, deadline, waiting)

    def check_told(
        self, operation: Operation, told: FoundDocuments | CBLookupReply
    ) -> None:
        """Check that matches are correct, and ranges disjoint, of one document each."""
        ranges = {each.start: each.end for each in told.ranges}
        assert sum(b - a for a, b in ranges.items()) == SIZE * len(told.matches)
        end, before = 0, None
        for match in told.matches:
            text = self.fixture.texts[ChunkHash(match.hash)]
            tokens = operation.tokens[match.start : match.start + SIZE]
            assert (text.is_document, text.salt) == (True, operation.salt)
            assert (match.old_start, text.tokens[-SIZE:]) == (
                len(text.tokens) - SIZE,
                tokens,
            )
            if match.start in ranges:
                assert match.start >= end
                last = ranges[match.start]
            else:
                assert match.start == end < last
                assert text.tokens == (*before, *tokens)
            end, before = match.start + SIZE, text.tokens
        assert set(ranges) <= {match.start for match in told.matches}

    def read(self, operation: Operation) -> None:
        """Remove a rank from the readers of the matches that it has read."""
        lease = self.leases.get(operation.session)
        if lease is None or lease is not operation.lease:
            return
        starts = [match.start for match in operation.request.matches] or [
            start
            for each in operation.request.ranges
            for start in range(each.start, each.end, SIZE)
        ]
        rank = operation.instance.rank
        for start, key in zip(starts, operation.copied, strict=True):
            number = lease.found.numbers.get(start)
            if number is not None and lease.found.matches[number].hash == key:
                lease.waiting[number].discard(rank)

    def is_searched(self) -> bool:
        """Return whether a lookup finds exactly what L1 has."""
        fixture = self.fixture
        fixture.blend.index.candidates(np.zeros(0, np.uint64))
        if fixture.tiers and (
            self.matcher != "anywhere" or fixture.blend.index.num_in_tier
        ):
            return False
        return bool(fixture.needs()) and not fixture.operations

    def search(self, tokens: Tokens, salt: str) -> list[int]:
        """Find documents by exhaustive search; return the start of each chunk."""
        needs = self.fixture.needs()
        known = self.fixture.texts
        chunks = self.fixture.l1.peek(list(known))
        there = {
            text.tokens
            for text, chunk in zip(known.values(), chunks, strict=True)
            if (text.is_document, text.salt) == (True, salt)
            and chunk is not None
            and chunk.ready & needs == needs
        }
        search = separated if self.matcher == "separated" else anywhere
        return [*search(tokens, there)]

    # -- invariants --------------------------------------------------------------------

    @invariant()
    def all_is_as_it_was_stored(self) -> None:
        """L1 is consistent, and every byte in it is the stored one."""
        self.fixture.check()

    @invariant()
    def leased_is_there(self) -> None:
        """Leased chunks remain until every rank has read them."""
        table = self.fixture.engine.leases._leases
        needs = self.fixture.needs()
        for key, lease in list(self.leases.items()):
            if not any(lease.waiting.values()):
                del self.leases[key]
                continue
            assert document_lease_owner(key) in table
            hashes = [
                ChunkHash(lease.found.matches[n].hash)
                for n, w in lease.waiting.items()
                if w
            ]
            for chunk in self.fixture.l1.peek(hashes):
                assert chunk is not None
                assert chunk.holds
                assert chunk.ready & needs == needs
        owners = {owner for owner in table if isinstance(owner, DocumentLeaseOwner)}
        assert owners == {document_lease_owner(key) for key in self.leases}

    @invariant()
    def the_index_has_what_is_there(self) -> None:
        """Between requests it has each chunk of L1, and none that L1 and tiers lack."""
        fixture, index = self.fixture, self.fixture.blend.index
        if self.matcher == "separated" or fixture.operations:
            return
        index.candidates(np.zeros(0, np.uint64))
        known = [key for key, text in fixture.texts.items() if text.is_document]
        for key, chunk in zip(known, fixture.l1.peek(known), strict=True):
            if chunk is not None:
                # No index has what another server may have stored in a tier.
                assert key in index or (self.matcher == "both" and fixture.tiers)
            elif not fixture.tiers:
                assert key not in index

    def teardown(self) -> None:
        """After all replies and ends of sessions nothing is held."""
        fixture = self.fixture
        try:
            fixture.finish_all()
            for key in KEYS:
                self.end_session(key)
            fixture.coordinator.run_due()
            stats = fixture.l1.stats()
            assert (stats.num_held, stats.num_reserved) == (0, 0)
            assert len(fixture.engine.leases) == len(fixture.engine.sessions) == 0
            assert not fixture.blend.lookups._found
            assert not fixture.engine.lookups._pending
            fixture.check()
            fixture.l1.drop(fixture.l1.hashes())
            assert fixture.arena.used_bytes == 0
        finally:
            fixture.close()


def anywhere(tokens: Tokens, there: set[Tokens]) -> Iterator[int]:
    """Yield each chunk's start: left to right, the longest run at each position."""
    at = 0
    while at + SIZE <= len(tokens):
        best = 0
        for document in there:
            if document[-SIZE:] == tokens[at : at + SIZE]:
                best = max(best, follow(document, tokens[at + SIZE :], there) + 1)
        yield from range(at, at + best * SIZE, SIZE)
        at += best * SIZE or 1


def follow(document: Tokens, tokens: Tokens, there: set[Tokens]) -> int:
    """Count the chunks by which a prompt continues a document."""
    count = 0
    while len(tokens) >= SIZE and (*document, *tokens[:SIZE]) in there:
        document, tokens = (*document, *tokens[:SIZE]), tokens[SIZE:]
        count += 1
    return count


def separated(tokens: Tokens, there: set[Tokens]) -> Iterator[int]:
    """Yield the start of each chunk, of each paragraph from its start on."""
    for first, mark in enumerate(tokens, 1):
        if mark == START:
            marks = (
                at for at in range(first, len(tokens)) if tokens[at] in (START, END)
            )
            text = tokens[first : next(marks, len(tokens))]
            yield from range(first, first + follow((), text, there) * SIZE, SIZE)


class Anywhere(BlendMachine):
    """Documents at any offset."""

    matcher = "anywhere"


class AnywhereOrBetweenMarks(BlendMachine):
    """Documents at any offset, and documents in tiers between marks."""

    matcher = "both"


class BetweenMarks(BlendMachine):
    """Documents between marks."""

    matcher = "separated"


TestAnywhere = Anywhere.TestCase
TestAnywhere.__doc__ = """No wrong match, no wrong byte, no lost hold."""
TestBetweenMarks = BetweenMarks.TestCase
TestBetweenMarks.__doc__ = """The same by the other matcher."""
TestAnywhereOrBetweenMarks = AnywhereOrBetweenMarks.TestCase
TestAnywhereOrBetweenMarks.__doc__ = """The same by both."""
TestAnywhere.settings = settings(
    max_examples=2 * settings().max_examples, stateful_step_count=40
)
TestAnywhereOrBetweenMarks.settings = settings(stateful_step_count=40)
TestBetweenMarks.settings = settings(stateful_step_count=40)
