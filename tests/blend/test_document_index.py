"""Document index: added entries are found, removed ones are not."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcore.blend.document_index import DocumentChunk, DocumentIndex, DocumentJournal
from kvcore.keys import ChunkHash

names = st.integers(0, 30)


def name(number: int) -> ChunkHash:
    """Return a chunk hash."""
    return ChunkHash(number.to_bytes(32, "little"))


MAX_IN_TIER = 3
KEYS = (0, 1, 2**63, 2**64 - 1)


class IndexMachine(RuleBasedStateMachine):
    """Compare an index with a dict; few keys and digests, so many collide."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name) / "kept"
        self.open()
        self.known: dict[ChunkHash, tuple[int, bytes]] = {}
        self.in_tier: list[ChunkHash] = []
        """Least recently used first."""

    def open(self) -> None:
        """Make an index with the kept journal."""
        self.kept = DocumentJournal(self.path, 4)
        self.index = DocumentIndex(64, MAX_IN_TIER, self.kept)
        for entry in self.kept.read():
            self.index.add(entry)

    @rule(number=names, key=st.sampled_from(KEYS), twin=st.booleans())
    def add(self, number: int, key: int, twin: bool) -> None:
        """Add a chunk."""
        digest = (b"same" if twin else b"%d" % number).ljust(32)
        self.index.add(DocumentChunk(name(number), key, digest, number))
        self.known.setdefault(name(number), (key, digest))

    @rule(number=names, in_tier=st.booleans())
    def leave(self, number: int, in_tier: bool) -> None:
        """L1 evicts a chunk: it stays if a tier has it, or had it before."""
        self.index.note_evicted(name(number), in_tier=in_tier)
        if name(number) not in self.known:
            return
        if name(number) in self.in_tier or in_tier:
            self.use(name(number))
        else:
            del self.known[name(number)]

    def use(self, key: ChunkHash) -> None:
        """Move a chunk to the end; above the limit, remove the first."""
        if key in self.in_tier:
            self.in_tier.remove(key)
        self.in_tier.append(key)
        if len(self.in_tier) > MAX_IN_TIER:
            del self.known[self.in_tier.pop(0)]

    @rule(number=names)
    def touch(self, number: int) -> None:
        """Use a chunk."""
        self.index.candidates(np.array([], np.uint64))
        self.index.touch(name(number))
        if name(number) in self.in_tier:
            self.use(name(number))

    @rule(number=names)
    def forget(self, number: int) -> None:
        """Neither L1 nor a tier has a chunk."""
        self.index.candidates(np.array([], np.uint64))
        self.index.remove(name(number))
        self.known.pop(name(number), None)
        if name(number) in self.in_tier:
            self.in_tier.remove(name(number))

    @rule()
    def restart(self) -> None:
        """Open the journal again: every entry is kept, and all chunks are in L1."""
        self.index.candidates(np.array([], np.uint64))
        self.kept.close()
        self.open()
        self.in_tier.clear()

    @invariant()
    def all_are_found(self) -> None:
        """Exactly the added chunks are found, by key and digest."""
        keys = {key for key, _ in self.known.values()}
        probed = np.array([*KEYS, 77], np.uint64)
        places = self.index.candidates(probed).tolist()
        assert keys <= {int(probed[place]) for place in places}
        for key, digest in {*self.known.values(), (77, b"same"), (1, b"none")}:
            found = {entry.hash for entry in self.index.find(key, digest)}
            expected = {h for h, kd in self.known.items() if kd == (key, digest)}
            assert found == expected
        assert len(self.index) == len(self.known)
        assert {k for k in self.known if self.index.is_in_tier(k)} == {*self.in_tier}

    def teardown(self) -> None:
        """Remove the file."""
        self.kept.close()
        self.folder.cleanup()


TestIndex = IndexMachine.TestCase


def test_an_empty_index_again_has_no_candidates() -> None:
    """Removed entries leave the filter: it excludes as many windows as at first."""
    index = DocumentIndex(1000)
    keys = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    for number, key in enumerate(keys.tolist()):
        index.add(DocumentChunk(name(number), key, b"", 0))
    assert index.candidates(keys).size == 1000
    for number in range(1000):
        index.note_evicted(name(number), in_tier=False)
    assert index.candidates(keys).size == 0
    assert len(index) == 0


def test_few_foreign_windows_pass_the_filter() -> None:
    """With the planned number of chunks, at most 2 % of foreign windows pass."""
    index = DocumentIndex(4096)
    rng = np.random.default_rng(1)
    for number, key in enumerate(
        rng.integers(0, 2**64, 4096, dtype=np.uint64).tolist()
    ):
        index.add(DocumentChunk(name(number), key, b"", 0))
    foreign = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    assert index.candidates(foreign).size < 2000
