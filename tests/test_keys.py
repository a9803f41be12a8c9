"""Chained hashes: equal if and only if tokens and extra material are equal."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import BadRequest
from kvcore.keys import (
    TOKEN_BYTES,
    ChunkHash,
    ExtraKey,
    HashChain,
    Tokens,
    chain_seed,
    pack_tokens,
    view_tokens,
)

CHUNK = 4
SEED = chain_seed("prefix", "model", 2, CHUNK)

ids = st.integers(0, 2**32 - 1)
sequences = st.lists(ids, max_size=40)


def extend(chain: HashChain, packed: bytes, slice_chunks: int = 3) -> int:
    """Run an extension to its end; return the number of pauses."""
    pauses = 0
    for _ in chain.extend(packed, slice_chunks):
        pauses += 1
    return pauses


def hashes(
    tokens: list[int], *extras: ExtraKey, seed: ChunkHash = SEED
) -> list[ChunkHash]:
    """The hashes of a sequence extended in one call."""
    chain = HashChain(seed, CHUNK, extras)
    extend(chain, pack_tokens(tokens))
    return chain.hashes


def first_difference(one: list[ChunkHash], other: list[ChunkHash]) -> int:
    """The number of equal leading hashes; all later ones must differ."""
    pairs = [a == b for a, b in zip(one, other, strict=True)]
    equal = pairs.index(False) if False in pairs else len(pairs)
    assert not any(pairs[equal:])
    return equal


@given(sequences, st.lists(st.integers(0, 40), max_size=5), st.integers(1, 12))
def test_cuts_and_slices_do_not_matter(
    tokens: list[int], cuts: list[int], slice_chunks: int
) -> None:
    """The hashes do not depend on how a sequence is cut into extensions."""
    chain = HashChain(SEED, CHUNK)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for start, end in pairwise(edges):
        extend(chain, pack_tokens(tokens[start:end]), slice_chunks)
        assert chain.num_tokens == end
    assert chain.hashes == hashes(tokens)
    assert chain.tail == pack_tokens(tokens[len(tokens) // CHUNK * CHUNK :])


@given(st.lists(ids, min_size=1, max_size=40), st.data())
def test_a_token_changes_its_chunk_and_all_later(
    tokens: list[int], data: st.DataObject
) -> None:
    """A changed token changes its chunk and all later ones, no earlier one."""
    place = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[place] ^= 1
    whole = len(tokens) // CHUNK
    assert first_difference(hashes(tokens), hashes(other)) == min(place // CHUNK, whole)


@given(st.lists(ids, min_size=CHUNK, max_size=40), st.data())
def test_extras_change_their_chunk_and_all_later(
    tokens: list[int], data: st.DataObject
) -> None:
    """Material changes the chunk that it starts in and all later ones."""
    start = data.draw(st.integers(0, len(tokens) - 1))
    salted = hashes(tokens, ExtraKey(start, b"salt"))
    whole = len(tokens) // CHUNK
    assert first_difference(hashes(tokens), salted) == min(start // CHUNK, whole)


@pytest.mark.parametrize(
    "extras",
    [
        (ExtraKey(1, b"ab"),),
        (ExtraKey(0, b"abc"),),
        (ExtraKey(0, b"a"), ExtraKey(0, b"b")),
        (ExtraKey(0, b"b"), ExtraKey(0, b"a")),
        (ExtraKey(0, b""),),
        (),
    ],
)
def test_extras_differ_by_material_place_and_number(
    extras: tuple[ExtraKey, ...],
) -> None:
    """No two of these give equal hashes, or those of one `ab` at the start."""
    tokens = [1, 2, 3, 4]
    assert hashes(tokens, *extras) != hashes(tokens, ExtraKey(0, b"ab"))


def test_extras_count_in_extensions_too() -> None:
    """Material of a later chunk is hashed if tokens arrive one by one."""
    extra = ExtraKey(5, b"image")
    chain = HashChain(SEED, CHUNK, (extra,))
    for token in range(9):
        extend(chain, pack_tokens([token]))
    assert chain.hashes == hashes(list(range(9)), extra)


@pytest.mark.parametrize(
    ("space", "model", "world_size", "chunk_size"),
    [
        ("document", "model", 2, CHUNK),
        ("prefix", "model@2", 2, CHUNK),
        ("prefix", "model", 1, CHUNK),
        ("prefix", "model", 2, 8),
        ("prefixmodel", "", 2, CHUNK),
    ],
)
def test_every_part_of_the_identity_changes_the_seed(
    space: str, model: str, world_size: int, chunk_size: int
) -> None:
    """Chunks of another space, model, world size or chunk size share no hash."""
    other = chain_seed(space, model, world_size, chunk_size)
    assert other != SEED
    tokens = [1, 2, 3, 4] * 3
    assert first_difference(hashes(tokens, seed=other), hashes(tokens)) == 0


def test_the_seed_does_not_change_between_versions() -> None:
    """Stored chunks stay reachable: this value may change only with the algorithm."""
    assert (
        SEED.hex() == "41df1ebcef4461ef0b494a90c98b67224f011392dc4cafa6e75e82dcdbd0017e"
    )
    assert (
        hashes([1, 2, 3, 4])[0].hex()
        == "e722a5340ff6c1fe5d6abf337bba1a577d9fe5801e755a1fedebc17f6554b7d6"
    )


def test_others_go_first_between_slices() -> None:
    """An extension pauses after every slice but the last."""
    packed = pack_tokens(range(9 * CHUNK + 1))
    assert extend(HashChain(SEED, CHUNK), packed, 3) == 2
    assert extend(HashChain(SEED, CHUNK), packed, 9) == 0
    assert extend(HashChain(SEED, CHUNK), packed, 4) == 2


def test_packed_views_are_hashed_and_let_go() -> None:
    """A view of a frame gives the same hashes, and the chain keeps no reference."""
    packed = bytearray(pack_tokens(range(10)))
    chain = HashChain(SEED, CHUNK)
    view = memoryview(packed)
    extend(chain, view)
    view.release()
    packed[:] = bytes(len(packed))
    assert chain.hashes == hashes(list(range(10)))
    assert chain.tail == pack_tokens([8, 9])


def test_rewinding_forgets_the_tail_and_later_chunks() -> None:
    """After a rewind the chain equals one that was never longer."""
    chain = HashChain(SEED, CHUNK)
    extend(chain, pack_tokens(range(14)))
    assert chain.num_tokens == 14
    chain.rewind(2)
    assert (chain.num_tokens, chain.tail) == (8, b"")
    extend(chain, pack_tokens([100, 101, 102, 103]))
    assert chain.hashes == hashes([*range(8), 100, 101, 102, 103])
    chain.rewind(0)
    assert (chain.num_tokens, chain.hashes) == (0, [])


@given(sequences)
def test_packing_keeps_every_id(tokens: list[int]) -> None:
    """Each token takes four little-endian bytes."""
    packed = pack_tokens(tokens)
    assert len(packed) == len(tokens) * TOKEN_BYTES
    assert np.frombuffer(packed, "<u4").tolist() == tokens


@pytest.mark.parametrize("dtype", ["<u4", ">u4", "i4", "i8", "u2", "u8"])
def test_arrays_pack_like_lists(dtype: str) -> None:
    """Packing does not depend on an array's width and byte order."""
    assert pack_tokens(np.array([1, 2, 65535], dtype)) == pack_tokens([1, 2, 65535])


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**32],
        [2**64],
        [1.0],
        [True, False],
        ["1"],
        [[1, 2], [3, 4]],
        np.array([1.5]),
        np.array(7),
        np.array([2**32], np.uint64),
        np.array([-1], np.int64),
    ],
)
def test_bad_ids_are_refused(tokens: list[int]) -> None:
    """Anything but a flat sequence of ids from 0 to 2**32 - 1 is a BadRequest."""
    with pytest.raises(BadRequest):
        pack_tokens(tokens)


def test_no_tokens_pack_to_nothing() -> None:
    """No tokens pack to zero bytes."""
    assert pack_tokens([]) == b""
    assert pack_tokens(deque()) == b""


@pytest.mark.parametrize(
    "tokens",
    [
        np.arange(9, dtype=np.uint32),
        np.arange(9, dtype=np.uint32)[::2],
        np.arange(9, dtype=np.int64),
        [3, 1, 2],
        np.array([], dtype=np.uint32),
    ],
    ids=["packed", "strided", "wide", "list", "empty"],
)
def test_a_view_of_tokens_has_the_packed_bytes(tokens: Tokens) -> None:
    """The bytes equal packed ones, whether viewed in place or packed."""
    assert bytes(view_tokens(tokens)) == pack_tokens(tokens)
