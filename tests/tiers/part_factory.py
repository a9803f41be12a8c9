"""Keys and parts for tests."""

from __future__ import annotations

from kvcore.extents import checksum_of
from kvcore.keys import ChunkHash
from kvcore.layout import Fingerprint
from kvcore.shm import Segment
from kvcore.tiers.tier import LoadItem, LoadOutcome, PartKey, StoreItem, Tier

LAYOUT = Fingerprint("0123456789abcdef")
PAGE = 64 << 10


def key_of(number: int, rank: int = 0, layout: Fingerprint = LAYOUT) -> PartKey:
    """A key for each number."""
    chunk = ChunkHash(number.to_bytes(4, "big") * 8)
    return PartKey(chunk, rank, 0, layout)


def view(arena: Segment, offset: int, length: int) -> memoryview:
    """Bytes of the arena."""
    return arena.array.data[offset : offset + length]


def store_item(number: int, *buffers: memoryview) -> StoreItem:
    """A blob with its checksum."""
    return StoreItem(key_of(number), buffers, checksum_of(buffers))


def outcome(tier: Tier, key: PartKey, *buffers: memoryview) -> LoadOutcome:
    """Load one part."""
    (loaded,) = tier.load([LoadItem(key, buffers)]).result()
    return loaded.outcome


def load_checked(tier: Tier, blob: StoreItem, *buffers: memoryview) -> bool:
    """Load what was stored, and say whether it came, whole and right."""
    (loaded,) = tier.load([LoadItem(blob.key, buffers)]).result()
    if loaded.outcome is not LoadOutcome.DONE:
        return False
    return loaded.checksum == blob.checksum == checksum_of(buffers)
