"""Explanations of misses."""

from __future__ import annotations

import pytest

from kvcore.engine.explain import MissHistory
from kvcore.keys import ChunkHash, SessionKey
from kvcore.storage.arena import Arena
from kvcore.storage.chunk import Chunk, DropReason, Removal
from kvcore.storage.eviction import make_policy
from kvcore.storage.l1 import L1
from kvcore.storage.required_parts import RequiredParts

KEY = SessionKey("engine", "request")
HASH = ChunkHash(bytes(range(32)))


@pytest.mark.parametrize("about", ["request", HASH.hex()[:12], HASH.hex()])
def test_no_finding_has_a_whole_hash(about: str) -> None:
    """Any client may ask; 16 digits name the chunk, and more are not told."""
    history = MissHistory()
    chunk = Chunk(HASH, {})
    history.note_removal(Removal(chunk, DropReason.EVICTED, KEY))
    history.note_miss(KEY, [HASH], 0, None, RequiredParts(0, ()), "")
    arena = Arena(64, 64)
    findings = history.explain(about, L1(arena, make_policy("lru")))
    arena.close()
    assert {finding.code for finding in findings} >= {"missed", "evicted"}
    text = "".join(finding.message for finding in findings)
    assert HASH.hex()[:16] in text
    assert HASH.hex()[:17] not in text
