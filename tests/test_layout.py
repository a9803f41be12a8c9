"""Derivation of layouts: errors by field, and fingerprints of parts."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from kvcore.errors import LayoutError
from kvcore.layout import CacheGroup, KVLayout, MemoryLayoutDesc, PartLayout, TensorView

BLOCKS, CHUNK = 10, 32


def strides(*shape: int, item: int = 2) -> tuple[int, ...]:
    """C-contiguous strides in bytes."""
    steps = [item]
    for size in reversed(shape[1:]):
        steps.insert(0, steps[0] * size)
    return tuple(steps)


def view(*shape: int, memory: str = "", axes: str = "", handle: int = 0) -> TensorView:
    """A contiguous tensor; `memory` is the order of its axes in memory."""
    if not memory:
        return TensorView(handle, 0, shape, strides(*shape))
    lying = strides(*(shape[axes.index(letter)] for letter in memory))
    by_axis = tuple(lying[memory.index(letter)] for letter in axes)
    return TensorView(handle, 0, shape, by_axis)


def tokens(
    axes: str, *shape: int, memory: str = "", block_size: int = 16
) -> CacheGroup:
    """One float16 tensor of a token-addressed group."""
    tensor = view(*shape, memory=memory, axes=axes)
    return CacheGroup(axes, "float16", block_size, (tensor,))


def pages(axes: str, *shape: int, block_size: int = 16) -> CacheGroup:
    """One float16 tensor of a group of opaque pages."""
    return CacheGroup(axes, "float16", block_size, (view(*shape),), "pages")


def derive(group: CacheGroup, chunk_size: int = CHUNK) -> KVLayout:
    """Derive a layout with handles that are large enough."""
    return KVLayout.derive(group, [1 << 20] * 4, chunk_size)


FLASH = tokens("KNSHD", 2, BLOCKS, 16, 4, 8)


@pytest.mark.parametrize(
    ("group", "order", "unit_bytes", "slot_stride", "inner"),
    [
        (FLASH, "token", 64, 64, ""),
        (tokens("NKSHD", BLOCKS, 2, 16, 4, 8), "token", 64, 64, ""),
        (tokens("NSKHD", BLOCKS, 16, 2, 4, 8), "token", 64, 128, ""),
        (tokens("NSD", BLOCKS, 16, 36), "token", 72, 72, ""),
        (tokens("LKNSHD", 3, 2, BLOCKS, 16, 4, 8), "token", 64, 64, ""),
        (tokens("KLNSD", 2, 3, 40, 1, 8, block_size=1), "token", 16, 16, ""),
        (tokens("KNHSD", 2, BLOCKS, 1, 16, 8), "token", 16, 16, ""),
        (tokens("KNHSD", 2, BLOCKS, 4, 1, 8, block_size=1), "token", 64, 16, ""),
        (tokens("KNSDH", 2, BLOCKS, 16, 8, 4), "token", 64, 64, "D8,H4"),
        (tokens("KNHSD", 2, BLOCKS, 4, 16, 8), "block", 1024, 2, "H4,S16,D8"),
        (tokens("KNHDS", 2, BLOCKS, 4, 8, 16), "block", 1024, 2, "H4,D8,S16"),
        (pages("NPPP", BLOCKS, 4, 16, 16), "page", 2048, 0, ""),
        (pages("LNP", 3, BLOCKS, 100), "page", 200, 0, ""),
    ],
)
def test_units_follow_the_memory(
    group: CacheGroup, order: str, unit_bytes: int, slot_stride: int, inner: str
) -> None:
    """A unit is a token if its heads are contiguous, else a block, or a page."""
    layout = derive(group)
    part = layout.part
    assert (part.order, part.unit_bytes, part.inner) == (order, unit_bytes, inner)
    assert part.unit_tokens == (1 if order == "token" else group.block_size)
    assert layout.num_blocks == group.tensors[0].shape[group.axes.index("N")]
    if part.unit_tokens == 1:
        assert layout.slot_stride == slot_stride


def test_planes_come_k_first_then_tensors_then_layers() -> None:
    """Plane p is K or V of one layer, at its own handle and offset."""
    shape, steps = (2, 3, BLOCKS, 4, 8), (1200, 400, 40, 8, 1)
    tensors = (TensorView(0, 64, shape, steps), TensorView(1, 0, shape, steps))
    group = CacheGroup("KLNSD", "uint8", 4, tensors)
    layout = KVLayout.derive(group, [3000, 3000], 8)
    layers = [0, 400, 800]
    one = [*(64 + o for o in layers), *layers]
    assert layout.plane_handles == (0, 0, 0, 1, 1, 1) * 2
    assert layout.plane_offsets.tolist() == [*one, *(1200 + o for o in one)]
    assert (layout.part.num_kv, layout.part.num_layers) == (2, 6)
    assert (layout.block_stride, layout.slot_stride, layout.num_blocks) == (
        40,
        8,
        BLOCKS,
    )


def changed(tensor: TensorView | None = None, **fields: object) -> CacheGroup:
    """The valid group with some fields changed."""
    if tensor is not None:
        fields["tensors"] = (FLASH.tensors[0], tensor)
    return replace(FLASH, **fields)


def alone(**fields: object) -> CacheGroup:
    """The valid group with changed fields in its only tensor."""
    return replace(FLASH, tensors=(replace(GOOD, **fields),))


GOOD = FLASH.tensors[0]
S = GOOD.strides
PAST_END = (1 << 20) - 2 * S[0] + 1
HEADS_OUTSIDE = tokens("KNSHD", 2, BLOCKS, 16, 4, 8, memory="HKNSD")
HEAD_MAJOR = tokens("KNHSD", 2, BLOCKS, 4, 16, 8)
GAPS = TensorView(0, 0, (4, 2, 8), (40, 10, 1))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (changed(axes="KNSHX"), r"axes 'KNSHX': tokens take each of LKNSHD"),
        (changed(axes="KNNHD"), r"axes 'KNNHD'"),
        (changed(axes="KKSHD"), r"axes 'KKSHD'"),
        (changed(axes="KNSHP"), r"axes 'KNSHP'"),
        (changed(kind="pages"), r"axes 'KNSHD': pages take each of LNP"),
        (pages("KNPP", 2, BLOCKS, 4, 8), r"axes 'KNPP'"),
        (pages("N", BLOCKS), r"axes 'N'"),
        (changed(dtype="float12"), r"dtype 'float12': known are bfloat16"),
        (changed(block_size=12), r"block_size 12 does not divide the chunk size 32"),
        (changed(block_size=8), r"axes S: 16 slots, but block_size is 8"),
        (changed(window=0), r"window 0"),
        (changed(axes="NSHD"), r"tensors\[0\]: axes 'NSHD' need 4 dimensions"),
        (changed(replace(GOOD, strides=S[1:])), r"tensors\[1\]: axes .* need 5"),
        (changed(replace(GOOD, handle=4)), r"tensors\[1\]: no handle 4"),
        (changed(replace(GOOD, shape=(2, 9, 16, 4, 8))), r"tensors\[1\]: shape and"),
        (changed(replace(GOOD, strides=(*S[:4], 4))), r"tensors\[1\]: shape and"),
        (
            changed(replace(GOOD, offset=PAST_END)),
            r"tensors\[1\]: ends at byte 1048577",
        ),
        (alone(shape=(2, 0, 16, 4, 8)), r"tensors\[0\]: sizes"),
        (alone(strides=(0, *S[1:])), r"tensors\[0\]: sizes"),
        (alone(strides=(*S[:1], -S[1], *S[2:])), r"tensors\[0\]: sizes"),
        (alone(strides=(*S[:1], 1022, *S[2:])), r"tensors\[0\]: strides .* ove"),
        (alone(strides=(*S[:4], 1)), r"tensors\[0\]: strides .* ove"),
        (tokens("KNSHD", 3, BLOCKS, 16, 4, 8), r"axes K: is K and V, not 3"),
        (HEADS_OUTSIDE, r"axes: neither a token's"),
        (
            CacheGroup("NPP", "uint8", 16, (GAPS,), "pages"),
            r"axes P: a page must be contiguous",
        ),
    ],
)
def test_wrong_descriptions_are_refused_by_field(
    group: CacheGroup, message: str
) -> None:
    """An invalid field is a LayoutError that begins with its name."""
    with pytest.raises(LayoutError, match=f"^{message}"):
        derive(group)


@pytest.mark.parametrize("field", ["handle", "offset"])
def test_negative_places_do_not_pass_the_wire(field: str) -> None:
    """A tensor before its handle's start is refused by the decoder."""
    wire = msgspec.msgpack.encode(replace(GOOD, **{field: -1}))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(wire, type=TensorView)


def fingerprint(group: CacheGroup, chunk_size: int = CHUNK) -> str:
    """The fingerprint of a group's part."""
    return derive(group, chunk_size).part.fingerprint


@pytest.mark.parametrize(
    "group",
    [
        tokens("NKSHD", BLOCKS, 2, 16, 4, 8),
        tokens("KNSHD", 2, BLOCKS, 16, 4, 8, memory="NSKHD"),
        tokens("KNSHD", 2, 99, 4, 4, 8, block_size=4),
        tokens("LKNSHD", 1, 2, BLOCKS, 16, 4, 8),
        replace(FLASH, tensors=(replace(GOOD, offset=640, handle=2),)),
    ],
)
def test_paging_does_not_change_a_part_of_tokens(group: CacheGroup) -> None:
    """The size, number and location of blocks do not change the fingerprint."""
    assert fingerprint(group) == fingerprint(FLASH)


@pytest.mark.parametrize(
    "group",
    [
        changed(dtype="bfloat16"),
        changed(window=8),
        changed(replicated=True),
        changed(GOOD),
        tokens("KNSHD", 2, BLOCKS, 16, 4, 16),
        tokens("NSHD", BLOCKS, 16, 4, 8),
        tokens("KNSDH", 2, BLOCKS, 16, 8, 4),
        HEAD_MAJOR,
        pages("NPPP", BLOCKS, 2, 16, 32),
    ],
)
def test_what_changes_the_bytes_changes_the_fingerprint(group: CacheGroup) -> None:
    """Parts with different bytes have different fingerprints."""
    assert fingerprint(group) != fingerprint(FLASH)
    assert fingerprint(FLASH, 64) != fingerprint(FLASH)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            HEAD_MAJOR,
            tokens("KNHSD", 2, BLOCKS, 4, 8, 8, block_size=8),
        ),
        (
            HEAD_MAJOR,
            tokens("KNHDS", 2, BLOCKS, 4, 8, 16),
        ),
        (pages("NPP", BLOCKS, 16, 8), pages("NPP", BLOCKS, 8, 8, block_size=8)),
        (pages("NPP", BLOCKS, 16, 8), pages("NPP", BLOCKS, 16, 8, block_size=8)),
    ],
)
def test_block_size_and_inside_count_where_blocks_stay_closed(
    one: CacheGroup, other: CacheGroup
) -> None:
    """In block and page order, the layout inside a block is part of the layout."""
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    ("group", "num_tokens", "shape", "dtype"),
    [
        (FLASH, 32, (2, 1, 32, 32), "float16"),
        (FLASH, 5, (2, 1, 5, 32), "float16"),
        (tokens("NSD", BLOCKS, 16, 36), 32, (1, 1, 32, 36), "float16"),
        (HEAD_MAJOR, 32, (2, 1, 2, 512), "float16"),
        (HEAD_MAJOR, 17, (2, 1, 2, 512), "float16"),
        (pages("LNPP", 3, BLOCKS, 16, 10), 32, (3, 2, 320), "uint8"),
        (pages("LNPP", 3, BLOCKS, 16, 10), 16, (3, 1, 320), "uint8"),
    ],
)
def test_descs_have_the_contract_s_shapes(
    group: CacheGroup, num_tokens: int, shape: tuple[int, ...], dtype: str
) -> None:
    """The shape is `[KV, L, T, D]`, with blocks or pages in place of tokens."""
    part = derive(group).part
    assert part.desc(num_tokens) == MemoryLayoutDesc((shape,), (dtype,))


def test_a_part_s_size_is_its_desc_s() -> None:
    """A part's size is planes times units times bytes per unit."""
    part = derive(replace(FLASH, tensors=(GOOD, GOOD, GOOD))).part
    assert (part.num_planes, part.plane_bytes, part.num_bytes) == (6, 2048, 12288)


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (FLASH, "1 layer, 64 bytes per token (float16)"),
        (
            replace(tokens("NSD", BLOCKS, 16, 36), window=8, replicated=True),
            "1 layer, one plane per layer, 72 bytes per token (float16), window 8, "
            "replicated",
        ),
        (HEAD_MAJOR, "1 layer, 1024 bytes per 16-token block (float16)"),
    ],
)
def test_parts_describe_themselves(group: CacheGroup, text: str) -> None:
    """Error messages contain this text."""
    assert str(derive(group).part) == text


def test_a_fingerprint_survives_the_wire() -> None:
    """An equal value in another process has the same fingerprint."""
    part = derive(FLASH).part
    wire = msgspec.msgpack.encode(part)
    assert msgspec.msgpack.decode(wire, type=PartLayout).fingerprint == part.fingerprint
    assert len(part.fingerprint) == 16
