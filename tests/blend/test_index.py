"""The index of documents: what is entered is found, what has left is not."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcore.blend.index import DocumentIndex, Entry
from kvcore.keys import ChunkHash

names = st.integers(0, 30)


def name(number: int) -> ChunkHash:
    """Name a chunk."""
    return ChunkHash(number.to_bytes(32, "little"))


class IndexMachine(RuleBasedStateMachine):
    """An index beside a dict, with few keys and digests so that many are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.index = DocumentIndex(64)
        self.known: dict[ChunkHash, tuple[int, bytes]] = {}

    @rule(
        number=names, key=st.sampled_from((0, 1, 2**63, 2**64 - 1)), twin=st.booleans()
    )
    def add(self, number: int, key: int, twin: bool) -> None:
        """Enter a chunk."""
        digest = b"same" if twin else b"%d" % number
        self.index.add(Entry(name(number), key, digest, number))
        self.known.setdefault(name(number), (key, digest))

    @rule(number=names)
    def forget(self, number: int) -> None:
        """Have a chunk leave L1."""
        self.index.forget(name(number))
        self.known.pop(name(number), None)

    @invariant()
    def all_are_found(self) -> None:
        """Every entered chunk, and no other, is found under its key and digest."""
        keys = {key for key, _ in self.known.values()}
        asked = np.array([0, 1, 2**63, 2**64 - 1, 77], np.uint64)
        places = self.index.candidates(asked).tolist()
        assert keys <= {int(asked[place]) for place in places}
        for key, digest in {*self.known.values(), (77, b"same"), (1, b"none")}:
            found = {entry.hash for entry in self.index.find(key, digest)}
            expected = {h for h, kd in self.known.items() if kd == (key, digest)}
            assert found == expected
        assert len(self.index) == len(self.known)


TestIndex = IndexMachine.TestCase


def test_an_empty_index_again_has_no_candidates() -> None:
    """The filter forgets with its entries, so that it stays as sharp as it began."""
    index = DocumentIndex(1000)
    keys = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    for number, key in enumerate(keys.tolist()):
        index.add(Entry(name(number), key, b"", 0))
    assert index.candidates(keys).size == 1000
    for number in range(1000):
        index.forget(name(number))
    assert index.candidates(keys).size == 0
    assert len(index) == 0


def test_few_foreign_windows_pass_the_filter() -> None:
    """With as many chunks as it was made for, one window in fifty passes at most."""
    index = DocumentIndex(4096)
    rng = np.random.default_rng(1)
    for number, key in enumerate(
        rng.integers(0, 2**64, 4096, dtype=np.uint64).tolist()
    ):
        index.add(Entry(name(number), key, b"", 0))
    foreign = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    assert index.candidates(foreign).size < 2000
