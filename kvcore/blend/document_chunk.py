"""What the index and its file know of one chunk of a document."""

from __future__ import annotations

import msgspec

from kvcore.keys import ChunkHash

NO_SLOT = -1


class DocumentChunk(msgspec.Struct, eq=False, gc=False):
    """One chunk of a document. `before` and `after` share its rolling hash."""

    hash: ChunkHash
    key: int
    digest: bytes
    """Of its own tokens, in its space."""
    start: int
    """Position in its document."""
    slot: int = NO_SLOT
    """Where it is kept across restarts."""
    before: DocumentChunk | None = None
    after: DocumentChunk | None = None
