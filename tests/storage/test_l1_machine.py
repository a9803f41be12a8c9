"""L1 and leases under random operations, against a simple model.

Every eviction policy, with and without quotas and a watermark; writers, readers and
schedulers die at any step, chunks are found corrupt, reservations are settled twice.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvcore.engine.leases import EndReason, LeaseTable
from kvcore.extents import Allocation
from kvcore.keys import ChunkHash, SessionKey
from kvcore.layout import Fingerprint
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import PartName
from kvcore.storage.eviction import POLICIES
from kvcore.storage.l1 import L1, Chunk, PartId, Reservation
from kvcore.storage.quotas import Quotas, make_order

PAGE = 64
NUM_PAGES = 14
PROMPTS = [[ChunkHash(bytes([p, i])) for i in range(5)] for p in range(3)]
PART_BYTES = {PartId(0): 50, PartId(1): 100}
TTL_S = 10.0
LIMITS = {"salt:x": 3 * PAGE, "model:m0": 4 * PAGE}
"""Quotas of the sessions of engine x, and of the first prompt's model."""

prompts = st.sampled_from(PROMPTS)
lengths = st.integers(1, 5)
parts = st.sampled_from(sorted(PART_BYTES))
masks = st.integers(1, 3)
owners = st.builds(SessionKey, st.sampled_from("xy"), st.sampled_from("12"))
clients = st.sampled_from(["p", "q"])
starts = st.sampled_from([0, 0, 0, 1, 3])
ends = st.sampled_from([6, 6, 6, 4, 2])
readers = st.sampled_from([0, 1, 2, 3, 3])


@dataclass
class ModelLease:
    """The model of a lease: ranks that have yet to read each chunk."""

    chunks: list[Chunk]
    waiting: list[int]
    client: str
    deadline: float


@dataclass
class Clock:
    """A clock that the machine advances."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return the set time."""
        return self.now


class L1Machine(RuleBasedStateMachine):
    """Model of L1: committed parts, reservations and holds."""

    policy_name: str
    """Set by a class for each."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(NUM_PAGES * PAGE, PAGE)
        self.clock = Clock()
        self.writing: list[Reservation] = []
        self.settled: list[Reservation] = []
        self.acquired: list[list[Chunk | None]] = []
        self.leases: dict[SessionKey, ModelLease] = {}
        self.ready: dict[ChunkHash, int] = {}

    @initialize(
        limits=st.sampled_from([{}, LIMITS]), watermark=st.sampled_from([1.0, 0.7])
    )
    def build(self, limits: dict[str, int], watermark: float) -> None:
        """Create an empty L1."""
        self.policy = make_order(self.policy_name, limits, lambda key: key.engine_id)
        self.l1 = L1(self.arena, self.policy, watermark=watermark)
        self.table = LeaseTable(self.l1, TTL_S, self.clock)

    # -- writing --------------------------------------------------------------------

    @rule(
        prompt=prompts,
        start=st.integers(0, 4),
        length=lengths,
        part=parts,
        owner=owners,
    )
    def reserve(
        self,
        prompt: list[ChunkHash],
        start: int,
        length: int,
        part: PartId,
        owner: SessionKey,
    ) -> None:
        """Reserve parts and write their bytes; the prompt's own prefix stays."""
        hashes, prefix = prompt[start : start + length], prompt[:start]
        known = [chunk for chunk in self.l1.peek(prefix) if chunk]
        name = PartName(f"m{prompt[0][0]}", 2, int(part), 0, Fingerprint("f"))
        result = self.l1.reserve(
            hashes, part, PART_BYTES[part], name=name, owner=owner, prefix=prefix
        )
        made = result.reservations
        assert len(made) + result.num_present + result.num_dropped == len(hashes)
        dropped = [h for h in hashes if not self._known(h, part)]
        assert len(dropped) == result.num_dropped
        if dropped and made:
            assert hashes.index(dropped[0]) > made[-1].index
        assert [chunk for chunk in self.l1.peek(prefix) if chunk] == known
        for each in made:
            assert each.chunk.hash == hashes[each.index]
            self.arena.array[_places(each.extents)] = _pattern(each.chunk.hash, part)
        self.writing += made

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), write=st.booleans())
    def settle(self, data: st.DataObject, write: bool) -> None:
        """Commit or abort some reservations of any writer."""
        places = st.integers(0, len(self.writing) - 1)
        some = [self.writing[i] for i in sorted(data.draw(st.sets(places, min_size=1)))]
        self.writing = [each for each in self.writing if each not in some]
        self.settled = some
        if write:
            self._commit(some)
        else:
            self.l1.abort(some)

    @rule(prompt=prompts, length=lengths, owner=owners)
    def store(self, prompt: list[ChunkHash], length: int, owner: SessionKey) -> None:
        """Reserve and commit all parts."""
        others = self.writing
        for part in PART_BYTES:
            self.writing = []
            self.reserve(prompt, 0, length, part, owner)
            self._commit(self.writing)
        self.writing = others

    def _commit(self, some: list[Reservation]) -> None:
        kept = [each for each in some if not each.chunk.dropped]
        assert self.l1.commit(some) == len(kept)
        for each in kept:
            old = self.ready.get(each.chunk.hash, 0)
            self.ready[each.chunk.hash] = old | 1 << each.part

    @precondition(lambda self: self.settled)
    @rule(write=st.booleans())
    def settle_again(self, write: bool) -> None:
        """A second settlement changes nothing."""
        before = self.l1.stats()
        if write:
            assert self.l1.commit(self.settled) == 0
        else:
            self.l1.abort(self.settled)
        assert self.l1.stats() == before

    @rule(prompt=prompts, place=st.integers(0, 4))
    def condemn(self, prompt: list[ChunkHash], place: int) -> None:
        """Condemn a chunk, possibly while it is read or written."""
        key = prompt[place]
        for chunk in self.l1.peek([key]):
            if chunk is not None:
                assert self.l1.condemn(chunk)
                assert not self.l1.condemn(chunk)
                assert self.l1.peek([key]) == [None]
                self.ready.pop(key, None)

    # -- reading --------------------------------------------------------------------

    @rule(prompt=prompts, length=lengths, needs=masks)
    def acquire_leading(self, prompt: list[ChunkHash], length: int, needs: int) -> None:
        """Hold the leading run."""
        expected = self._leading(prompt[:length], needs)
        chunks = self.l1.acquire_leading(prompt[:length], needs)
        assert [chunk.hash for chunk in chunks] == expected
        self.acquired.append([*chunks])

    @rule(prompt=prompts, needs=st.lists(st.integers(0, 3), min_size=5, max_size=5))
    def acquire(self, prompt: list[ChunkHash], needs: list[int]) -> None:
        """Hold all or nothing."""
        have = [
            self.ready.get(key, 0) & need == need
            for key, need in zip(prompt, needs, strict=True)
        ]
        chunks = self.l1.acquire(prompt, needs)
        assert (chunks is not None) == all(have)
        if chunks is not None:
            assert [c is not None for c in chunks] == [n != 0 for n in needs]
            self.acquired.append(chunks)

    @precondition(lambda self: self.acquired)
    @rule(place=st.integers(0, 99))
    def release(self, place: int) -> None:
        """End a copy's hold."""
        self.l1.release(self.acquired.pop(place % len(self.acquired)))

    @rule(prompt=prompts, length=lengths)
    def touch(self, prompt: list[ChunkHash], length: int) -> None:
        """End a request."""
        self.l1.touch(prompt[:length])

    @rule()
    def clear(self) -> None:
        """Drop all chunks that are not in use."""
        used = {c.hash for c in self._in_use() if not c.dropped}
        before = self.l1.stats().num_chunks
        assert self.l1.drop(self.l1.hashes()) == before - len(used)
        assert self.l1.stats().num_chunks == len(used)
        assert set(self.ready).intersection(self._present()) <= used

    # -- leases ---------------------------------------------------------------------

    @rule(
        owner=owners, prompt=prompts, length=lengths, needs=masks, readers=readers,
        client=clients, stored=st.booleans(),
    )  # fmt: skip
    def look_up(
        self,
        owner: SessionKey,
        prompt: list[ChunkHash],
        length: int,
        needs: int,
        readers: int,
        client: str,
        stored: bool,
    ) -> None:
        """Look up and lease, mostly chunks that were just stored."""
        if stored:
            self.store(prompt, length, owner)
        chunks = self.l1.acquire_leading(prompt, needs)
        self.table.grant(owner, "model", chunks, readers, client)
        self.leases.pop(owner, None)
        if chunks and readers:
            waiting = [readers] * len(chunks)
            deadline = self.clock.now + TTL_S
            self.leases[owner] = ModelLease(chunks, waiting, client, deadline)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), start=starts, end=ends, rank=st.integers(0, 2))
    def read(self, data: st.DataObject, start: int, end: int, rank: int) -> None:
        """A rank reads some chunks."""
        owner = self._leasing(data)
        self.table.read(owner, start, end, rank)
        self._take(owner, start, end, 1 << rank)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), start=starts, end=ends)
    def free(self, data: st.DataObject, start: int, end: int) -> None:
        """The scheduler releases some chunks."""
        owner = self._leasing(data)
        self.table.free(owner, start, end)
        self._take(owner, start, end, 0b111)

    def _leasing(self, data: st.DataObject) -> SessionKey:
        return data.draw(st.sampled_from([*self.leases]))

    @rule(owner=owners, start=starts, end=ends, rank=st.integers(0, 2))
    def of_nobody(self, owner: SessionKey, start: int, end: int, rank: int) -> None:
        """Reads and releases of a session without a lease change nothing."""
        if owner not in self.leases:
            self.table.read(owner, start, end, rank)
            self.table.free(owner, start, end)
            self.table.end(owner)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """The session ends."""
        owner = self._leasing(data)
        self.table.end(owner)
        del self.leases[owner]

    @precondition(lambda self: self.leases)
    @rule(client=clients)
    def end_client(self, client: str) -> None:
        """A scheduler dies."""
        self.table.end_client(client)
        for owner in [o for o, lease in self.leases.items() if lease.client == client]:
            del self.leases[owner]

    @precondition(lambda self: self.leases)
    @rule(engine_id=st.sampled_from("xy"), rank=st.integers(0, 1))
    def drop_reader(self, engine_id: str, rank: int) -> None:
        """A worker dies."""
        self.table.drop_reader(b"", engine_id, rank)
        for owner in [o for o in self.leases if o.engine_id == engine_id]:
            self._take(owner, 0, 5, 1 << rank)

    @precondition(lambda self: self.leases)
    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0]))
    def expire(self, seconds: float) -> None:
        """Advance the clock."""
        self.clock.now += seconds
        late = [o for o, le in self.leases.items() if le.deadline <= self.clock.now]
        assert self.table.expire() == len(late)
        for owner in late:
            del self.leases[owner]

    # -- what always holds ----------------------------------------------------------

    @invariant()
    def state_is_consistent(self) -> None:
        """`check` finds nothing, and each account is the sum of its chunks."""
        self.l1.check()
        if isinstance(self.policy, Quotas):
            chunks = {*self._known_chunks(), *self._in_use()}
            for quota in self.l1.quotas():
                account = self.policy._accounts[quota.space]
                ours = [c for c in chunks if c.account is account]
                used = sum(p.num_bytes for c in ours for p in c.parts.values())
                assert quota.used_bytes == used

    @invariant()
    def what_may_go_can_go(self) -> None:
        """The policy evicts each listed chunk once, and no other."""
        order, gone = deepcopy(self.policy), []
        while (key := order.evict(lambda _: True)) is not None:
            gone.append(key)
        listed = [chunk.hash for chunk in self._known_chunks() if chunk.listed]
        assert sorted(gone) == sorted(listed)

    @invariant()
    def what_is_used_stays(self) -> None:
        """Held and reserved chunks keep their bytes, and are found unless condemned."""
        holders = Counter(self._held())
        for lease in self.leases.values():
            holders.update(
                c for c, w in zip(lease.chunks, lease.waiting, strict=True) if w
            )
        for chunk in self._in_use():
            assert (self.l1.peek([chunk.hash]) == [chunk]) != chunk.dropped
            assert chunk.holds == holders[chunk]
            self._check_bytes(chunk)
        for chunk in self._known_chunks():
            assert chunk.holds == holders[chunk]
        assert self.l1.stats().num_held == len(holders)
        assert self.l1.stats().num_reserved == len(self.writing)

    @invariant()
    def what_is_ready_was_committed(self) -> None:
        """All parts of a chunk leave together; ready parts have their bytes."""
        self.ready = {h: mask for h, mask in self.ready.items() if h in self._present()}
        for chunk in self._known_chunks():
            assert chunk.ready == self.ready.get(chunk.hash, 0)
            self._check_bytes(chunk)

    def _check_bytes(self, chunk: Chunk) -> None:
        for part_id, part in chunk.parts.items():
            seen = self.arena.array[_places(part.extents)]
            assert part.num_bytes == PART_BYTES[part_id]
            assert np.all(seen == _pattern(chunk.hash, part_id))

    @invariant()
    def ledger_balances(self) -> None:
        """Granted leases are ended plus live ones, and live ones are the model's."""
        ended = sum(self.table.num_ended[reason] for reason in EndReason)
        assert self.table.num_granted == ended + len(self.table)
        live = {
            (s.engine_id, s.request_id): (s.num_chunks, s.waiting_readers)
            for s in self.table.status(99)
        }
        assert live == {
            (o.engine_id, o.request_id): _describe(le) for o, le in self.leases.items()
        }
        deadlines = [lease.deadline for lease in self.leases.values()]
        assert self.table.next_deadline() == min(deadlines, default=None)

    def teardown(self) -> None:
        """After all holds and reservations end, all pages are free."""
        try:
            for owner in list(self.leases):
                self.table.end(owner)
            for chunks in self.acquired:
                self.l1.release(chunks)
            self.l1.abort(self.writing)
            self.l1.check()
            assert self.l1.stats().num_held == self.l1.stats().num_reserved == 0
            self.l1.drop(self.l1.hashes())
            assert self.arena.used_bytes == 0
        finally:
            self.arena.close()

    # -- the model's own ------------------------------------------------------------

    def _take(self, owner: SessionKey, start: int, end: int, ranks: int) -> None:
        lease = self.leases.get(owner)
        if lease is not None:
            for i in range(start, min(end, len(lease.waiting))):
                lease.waiting[i] &= ~ranks
            if not any(lease.waiting):
                del self.leases[owner]

    def _in_use(self) -> set[Chunk]:
        leased = (
            chunk
            for lease in self.leases.values()
            for chunk, waiting in zip(lease.chunks, lease.waiting, strict=True)
            if waiting
        )
        return {*self._held(), *leased, *(each.chunk for each in self.writing)}

    def _known_chunks(self) -> list[Chunk]:
        known = (chunk for prompt in PROMPTS for chunk in self.l1.peek(prompt))
        return [chunk for chunk in known if chunk]

    def _present(self) -> set[ChunkHash]:
        return {chunk.hash for chunk in self._known_chunks() if chunk.ready}

    def _leading(self, hashes: list[ChunkHash], needs: int) -> list[ChunkHash]:
        have = [self.ready.get(h, 0) & needs == needs for h in hashes]
        return hashes[: have.index(False)] if False in have else hashes

    def _known(self, key: ChunkHash, part: PartId) -> bool:
        (chunk,) = self.l1.peek([key])
        return chunk is not None and part in chunk.parts

    def _held(self) -> list[Chunk]:
        return [chunk for chunks in self.acquired for chunk in chunks if chunk]


def _pattern(key: ChunkHash, part: PartId) -> int:
    """The byte that fills a part."""
    return 1 + key[0] * 32 + key[1] * 4 + part


def _places(extents: Allocation) -> npt.NDArray[np.int64]:
    """Return the offsets of a part's bytes."""
    pieces = [np.arange(e.offset, e.offset + e.length) for e in extents]
    return np.concatenate(pieces)


def _describe(lease: ModelLease) -> tuple[int, tuple[int, ...]]:
    waiting = 0
    for mask in lease.waiting:
        waiting |= mask
    ranks = tuple(rank for rank in range(8) if waiting >> rank & 1)
    return sum(mask != 0 for mask in lease.waiting), ranks


def _case(policy: str) -> type:
    """Make the test of one policy."""
    machine = type(f"L1Machine-{policy}", (L1Machine,), {"policy_name": policy})
    case = machine.TestCase
    case.__doc__ = f"""Random operations under {policy} agree with the model."""
    case.settings = settings(
        max_examples=2 * settings().max_examples, stateful_step_count=50
    )
    return case


TestLRU, TestUsesLRU, TestS3FIFO = map(_case, ("lru", "lru-uses", "s3fifo"))


def test_every_policy_has_its_machine() -> None:
    """Each registered policy has a test case above."""
    assert set(POLICIES) == {"lru", "lru-uses", "s3fifo"}
