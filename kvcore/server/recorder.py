"""Recorder of lookups, as a trace that can be replayed.

Mooncake's format, one lookup per line: `timestamp` (ms since the first),
`input_length`, `output_length` (unknown here, 0), `hash_ids`, `block_size`,
`session_id`, and in addition `model` and `world_size`. An id is the first 64 bits of a
chunk's chained hash, so two lines share the ids of exactly the chunks that their
prompts share. Tokens are not written and cannot be recovered from the hashes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

import msgspec

from kvcore.errors import SetupError
from kvcore.keys import ChunkHash
from kvcore.private_file import open_private
from kvcore.protocol import Lookup

log = logging.getLogger(__name__)

ID_BYTES = 8


class RecordedRequest(msgspec.Struct, frozen=True):
    """One line of the trace."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    block_size: int
    session_id: str
    model: str
    world_size: int


class Recorder:
    """A trace file, one line per lookup. Loop thread only.

    Each line is written at once, so a killed server loses none.

    Raises:
        SetupError: the file cannot be written.
    """

    def __init__(
        self, path: Path, chunk_size: int, clock: Callable[[], float] = monotonic
    ) -> None:
        self._path = path
        self._chunk_size = chunk_size
        self._clock = clock
        self._begun: float | None = None
        self._encoder = msgspec.json.Encoder()
        try:
            file = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        except OSError as error:
            raise SetupError(f"record = {path}: {error.strerror}") from None
        self._file = os.fdopen(file, "wb", buffering=0)

    def add(self, request: Lookup, hashes: Sequence[ChunkHash]) -> None:
        """Write a lookup; a full disk ends the recording, not the server."""
        if self._file.closed or not request.end:
            return
        line = self._encoder.encode(self._recorded(request, hashes)) + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            log.error("recording to %s ended: %s", self._path, error.strerror)
            self._file.close()

    def _recorded(
        self, request: Lookup, hashes: Sequence[ChunkHash]
    ) -> RecordedRequest:
        now = self._clock()
        self._begun = now if self._begun is None else self._begun
        session = request.session
        return RecordedRequest(
            timestamp=round((now - self._begun) * 1000, 3),
            input_length=request.end,
            output_length=0,
            hash_ids=[int.from_bytes(one[:ID_BYTES], "little") for one in hashes],
            block_size=self._chunk_size,
            session_id=f"{session.engine_id}/{session.request_id}",
            model=request.model,
            world_size=request.world_size,
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()
