"""Matchers, compared with a brute-force search of all stored documents."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.blend import matchers
from kvcore.blend.document_index import DocumentIndex
from kvcore.blend.matchers import (
    DocumentSpace,
    Matcher,
    RollingHashMatcher,
    SeparatorMatcher,
    TokenRun,
)
from kvcore.blend.paragraphs import Markers, split_paragraphs
from kvcore.blend.rolling_hash import SLICE_WINDOWS, RollingHash
from kvcore.keys import ChunkHash, ExtraKey, HashChain

SIZE = 4
SPACE = DocumentSpace("m", 1, SIZE)
T = TypeVar("T")


def end_of(steps: Generator[None, None, T]) -> T:
    """Run all steps and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def hashes_of(tokens: list[int], space: DocumentSpace = SPACE) -> list[ChunkHash]:
    """Return the chained hashes of a document's whole chunks."""
    chain = HashChain(space.seed, SIZE)
    for _ in chain.extend(np.array(tokens, np.uint32).tobytes(), 1 << 20):
        pass
    return chain.hashes


@dataclass
class Library:
    """A matcher, and the documents stored for it."""

    matcher: Matcher
    index: DocumentIndex

    def store(self, tokens: list[int], space: DocumentSpace = SPACE) -> list[ChunkHash]:
        """Store a document."""
        hashes = hashes_of(tokens, space)
        whole = np.array(tokens[: len(hashes) * SIZE], np.uint32)
        for entry in end_of(self.matcher.learn(whole, hashes, space)):
            self.index.add(entry)
        return hashes

    def find(self, tokens: list[int], space: DocumentSpace = SPACE) -> list[TokenRun]:
        """Return the runs found in a prompt."""
        prompt = np.array(tokens, np.uint32)
        return end_of(self.matcher.find(prompt, space, len))


def anywhere(
    base: int | None = None, separators: SeparatorMatcher | None = None
) -> Library:
    """Make an empty library; with base 1 a window's hash is the sum of its tokens."""
    index = DocumentIndex(1024, 1024)
    rolling = RollingHash(SIZE, base)
    return Library(RollingHashMatcher(index, rolling, separators), index)


def brute_runs(
    prompt: list[int], documents: list[list[int]]
) -> Iterator[tuple[int, int]]:
    """Yield (start, chunks): left to right, the longest run at each position."""
    start = 0
    while start + SIZE <= len(prompt):
        best = 0
        for document in documents:
            chunks = len(document) // SIZE
            for first in range(chunks):
                length = 0
                while first + length < chunks:
                    there = document[
                        (first + length) * SIZE : (first + length + 1) * SIZE
                    ]
                    at = start + length * SIZE
                    if prompt[at : at + SIZE] != there:
                        break
                    length += 1
                best = max(best, length)
        if best:
            yield start, best
        start += best * SIZE or 1


def check_hashes(
    runs: list[TokenRun], prompt: list[int], documents: list[list[int]]
) -> None:
    """Each returned chunk belongs to a document and has the prompt's tokens."""
    chunks = {
        key: (number * SIZE, document[number * SIZE : (number + 1) * SIZE])
        for document in documents
        for number, key in enumerate(hashes_of(document))
    }
    for run in runs:
        for number, key in enumerate(run.hashes):
            old_start, tokens = chunks[key]
            at = run.start + number * SIZE
            assert old_start == run.old_start + number * SIZE
            assert prompt[at : at + SIZE] == tokens


few = st.integers(0, 2)
document_lease_owner = st.lists(st.lists(few, max_size=24), max_size=5)


@st.composite
def planted(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Draw documents of few tokens, and a prompt with pieces of them."""
    documents = draw(document_lease_owner)
    prompt: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        prompt += draw(st.lists(few, max_size=5))
        if documents:
            document = draw(st.sampled_from(documents))
            first = draw(st.integers(0, len(document)))
            prompt += document[first : draw(st.integers(first, len(document)))]
    return documents, prompt


@given(
    case=planted(),
    base=st.sampled_from((None, 1)),
    step=st.sampled_from((1, 2, matchers.MATCH_STEP)),
)
def test_anywhere_equals_a_brute_force_search(
    case: tuple[list[list[int]], list[int]], base: int | None, step: int
) -> None:
    """Repeated, overlapping and shared chunks, colliding hashes, any step size."""
    documents, prompt = case
    library = anywhere(base)
    with mock.patch.object(matchers, "MATCH_STEP", step):
        for document in documents:
            library.store(document)
        runs = library.find(prompt)
    found = [(run.start, len(run.hashes)) for run in runs]
    assert found == list(brute_runs(prompt, documents))
    check_hashes(runs, prompt, documents)


@given(case=planted())
def test_separated_finds_each_paragraph_from_its_start(
    case: tuple[list[list[int]], list[int]],
) -> None:
    """A paragraph's chunks are hashed like a document's."""
    _, prompt = case
    markers = Markers(start=((0,),))
    matcher = SeparatorMatcher(markers, SIZE, 2)
    tokens = np.array(prompt, np.uint32)
    runs = end_of(matcher.find(tokens, SPACE, lambda _: 0))
    paragraphs = [prompt[p.start : p.end] for p in split_paragraphs(tokens, markers)]
    expected = [hashes_of(p) for p in paragraphs if len(p) >= SIZE]
    assert [run.hashes for run in runs] == expected
    assert all(run.old_start == 0 for run in runs)


@given(
    planted(),
    st.lists(st.sampled_from([(0,), (1, 1), (2, 0)]), min_size=1, max_size=2),
    st.lists(st.sampled_from([(2,), (0, 1)]), max_size=1),
)
def test_paragraphs_are_found_between_what_is_found_anywhere(
    case: tuple[list[list[int]], list[int]],
    start: list[tuple[int, ...]],
    end: list[tuple[int, ...]],
) -> None:
    """Each paragraph that begins outside known runs, up to the next run."""
    known, prompt = case
    markers = Markers(tuple(start), tuple(end))
    separators = SeparatorMatcher(markers, SIZE, 1)
    library, plain = anywhere(separators=separators), anywhere()
    for document in known:
        library.store(document)
        plain.store(document)
    runs, plain_runs = library.find(prompt), plain.find(prompt)
    assert [run for run in runs if run in plain_runs] == plain_runs
    taken = {
        at
        for run in plain_runs
        for at in range(run.start, run.start + len(run.hashes) * SIZE)
    }
    expected = []
    for each in split_paragraphs(np.array(prompt, np.uint32), markers):
        free = next((at for at in range(each.start, each.end) if at in taken), each.end)
        hashes = hashes_of(prompt[each.start : free])
        if hashes:
            expected.append(TokenRun(0, each.start, hashes))
    assert [run for run in runs if run not in plain_runs] == expected
    assert [run.start for run in runs] == sorted({run.start for run in runs})


def test_a_document_crosses_a_slice_of_windows() -> None:
    """Nothing is missed or found twice where hashing continues in another slice."""
    library = anywhere()
    rng = np.random.default_rng(0)
    document = rng.integers(100, 200, 5 * SIZE).tolist()
    library.store(document)
    for shift in range(-2 * SIZE, 2 * SIZE):
        glue = rng.integers(0, 100, 2 * SLICE_WINDOWS).tolist()
        at = SLICE_WINDOWS - len(document) // 2 + shift
        prompt = [*glue[:at], *document, *glue[at:]]
        assert [(r.start, len(r.hashes)) for r in library.find(prompt)] == [(at, 5)]


def test_forged_collisions_are_no_matches() -> None:
    """Two chunks with equal rolling hashes are distinguished by their digests."""
    base = 0x9E3779B97F4A7C15
    ours, forged = forge(base)
    rolling = RollingHash(SIZE, base)
    windows = [rolling.windows(np.array(w, np.uint32))[0] for w in (ours, forged)]
    assert windows[0] == windows[1]
    assert ours != forged
    library = anywhere(base)
    library.store(ours)
    assert library.find([7, *forged, 7]) == []
    library.store(forged)
    (run,) = library.find([7, *forged, 7])
    assert run.hashes == hashes_of(forged)
    (run,) = library.find([7, *ours, 7])
    assert run.hashes == hashes_of(ours)


def forge(base: int) -> tuple[list[int], list[int]]:
    """Make two chunks of equal hash, which requires the base.

    Half of Euclid's algorithm gives small x and y with x + y * inverse = 0 mod 2**64.
    """
    modulus = 1 << 64
    before, now = (modulus, 0), (pow(base, -1, modulus), 1)
    while now[0] >= 1 << 32:
        quotient = before[0] // now[0]
        before, now = (
            now,
            (before[0] - quotient * now[0], before[1] - quotient * now[1]),
        )
    x, y = -now[0], now[1]
    middle = [max(0, -x), max(0, -y), 5, 5]
    return middle, [middle[0] + x, middle[1] + y, 5, 5]


def test_models_share_no_documents() -> None:
    """The same tokens of another model or world size are another document."""
    library = anywhere()
    tokens = list(range(2 * SIZE))
    library.store(tokens)
    for other in (DocumentSpace("n", 1, SIZE), DocumentSpace("m", 2, SIZE)):
        assert library.find(tokens, other) == []
        library.store(tokens, other)
        (run,) = library.find(tokens, other)
        assert run.hashes == hashes_of(tokens, other)


def test_only_ready_chunks_are_found() -> None:
    """A run ends at the first missing chunk; another document may be longer."""
    library = anywhere()
    first = library.store([1] * SIZE + [2] * SIZE + [3] * SIZE)
    second = library.store([9] * SIZE + [2] * SIZE + [3] * SIZE)
    prompt = np.array([2] * SIZE + [3] * SIZE, np.uint32)
    gone = {second[1], first[2]}

    def count_ready(hashes: list[ChunkHash]) -> int:
        return next((n for n, h in enumerate(hashes) if h in gone), len(hashes))

    (run, rest) = end_of(library.matcher.find(prompt, SPACE, count_ready))
    assert (run.hashes, rest.hashes) == ([first[1]], [second[2]])


@given(case=planted(), data=st.data())
def test_what_tiers_may_have_counts_and_is_cut_apart(
    case: tuple[list[list[int]], list[int]], data: st.DataObject
) -> None:
    """Chunks in tiers count as present; each piece is entirely in L1 or not at all."""
    documents, prompt = case
    library = anywhere()
    known = {key for document in documents for key in library.store(document)}
    there = {key for key in sorted(known) if data.draw(st.booleans())}
    for key in known - there:
        library.index.note_evicted(key, in_tier=True)

    def count_ready(hashes: list[ChunkHash]) -> int:
        return next((n for n, h in enumerate(hashes) if h not in there), len(hashes))

    tokens = np.array(prompt, np.uint32)
    pieces = end_of(library.matcher.find(tokens, SPACE, count_ready))
    whole: list[tuple[int, int]] = []
    for piece in pieces:
        assert count_ready(piece.hashes) in (0, len(piece.hashes))
        if piece.continues:
            start, length = whole.pop()
            assert start + length * SIZE == piece.start
            whole.append((start, length + len(piece.hashes)))
        else:
            whole.append((piece.start, len(piece.hashes)))
    assert whole == list(brute_runs(prompt, documents))
    check_hashes(pieces, prompt, documents)


def test_whole_prompt_material_makes_another_space() -> None:
    """Equal documents with another salt or adapter at token 0 are different."""
    library = anywhere()
    tokens = list(range(2 * SIZE))
    spaces = [
        DocumentSpace("m", 1, SIZE, tuple(ExtraKey(0, one) for one in extras))
        for extras in ((), (b"a",), (b"b",), (b"a", b"b"), (b"ab",))
    ]
    for number, space in enumerate(spaces):
        assert library.find(tokens, space) == []
        library.store(tokens, space)
        (run,) = library.find(tokens, space)
        assert run.hashes == hashes_of(tokens, space)
        assert len(library.index) == 2 * (number + 1)


def many(num_chunks: int) -> None:
    """Fill an index with random chunks; match random prompts and a stored document."""
    size = 16
    space, index = DocumentSpace("m", 1, size), DocumentIndex(num_chunks)
    rng = np.random.default_rng(5)
    matcher = RollingHashMatcher(index, RollingHash(size))
    per_document = 1000
    for _ in range(num_chunks // per_document):
        tokens = rng.integers(0, 1000, per_document * size, dtype=np.uint32)
        chain = HashChain(space.seed, size)
        end_of(chain.extend(tokens.tobytes(), 1 << 20))  # type: ignore[arg-type]
        for entry in end_of(matcher.learn(tokens, chain.hashes, space)):
            index.add(entry)
    assert len(index) == num_chunks
    for _ in range(10):
        prompt = rng.integers(0, 1000, 32_768, dtype=np.uint32)
        assert end_of(matcher.find(prompt, space, len)) == []
    prompt[777 : 777 + 40 * size] = tokens[5 * size : 45 * size]
    (run,) = end_of(matcher.find(prompt, space, len))
    assert (run.start, run.old_start, len(run.hashes)) == (777, 5 * size, 40)


def test_no_random_prompt_matches_among_many_chunks() -> None:
    """20,000 chunks and 300,000 random windows: only the stored document matches."""
    many(20_000)


@pytest.mark.soak
def test_no_random_prompt_matches_among_a_million_chunks() -> None:
    """The same with a million chunks."""
    many(1_000_000)
