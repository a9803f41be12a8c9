"""Requests whose prompts are sequences of documents and unique text.

A piece of a prompt has a content id, which determines its tokens at any position. A
piece is either a document, which is stored on its own, or unique text (glue). The
possible reuse follows from the pieces alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np

from kvctl.lab.config.workload_config import Documents
from kvctl.lab.traces import ragpulse_trace as ragpulse
from kvctl.lab.traces.trace_rows import Tokens

CHOICE, GLUE, LENGTH, PIECE = range(40, 44)
"""Streams of random numbers, distinct from those of other workloads."""
GLUE_CONTENT = 1 << 48
"""First content id of unique text."""


@dataclass(frozen=True, slots=True)
class DocumentPiece:
    """Tokens [start, end) of a prompt."""

    content: int
    start: int
    num_tokens: int
    is_document: bool

    @property
    def end(self) -> int:
        """One past its last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class DocumentRequest:
    """One request. `tokens(vocabulary)` generates its prompt."""

    index: int
    arrival_s: float | None
    output_length: int
    pieces: tuple[DocumentPiece, ...]

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return self.pieces[-1].end if self.pieces else 0

    @property
    def documents(self) -> list[DocumentPiece]:
        """Pieces that are stored on their own."""
        return [piece for piece in self.pieces if piece.is_document]

    def tokens(self, vocabulary: int) -> Tokens:
        """Return the prompt `[num_tokens]`; equal content ids have equal tokens."""
        made = [
            draw_tokens(vocabulary, piece.num_tokens, PIECE, piece.content)
            for piece in self.pieces
        ]
        return np.concatenate(made) if made else np.zeros(0, np.uint32)


def draw_tokens(vocabulary: int, num_tokens: int, *stream: int) -> Tokens:
    """Return the first tokens of a stream of random numbers."""
    return np.random.default_rng(stream).integers(
        vocabulary, size=num_tokens, dtype=np.uint32
    )


def requests(workload: Documents, seed: int) -> Iterator[DocumentRequest]:
    """Yield a workload's requests, from its trace if it has one.

    Raises:
        SetupError: from the trace reader, with file, line and reason.
    """
    made = _replayed(Path(workload.trace)) if workload.trace else None
    return islice(made or _generated(workload, seed), workload.max_requests)


def _replayed(folder: Path) -> Iterator[DocumentRequest]:
    for index, row in enumerate(ragpulse.read(folder)):
        contents = [(content.id, content.num_tokens) for content in row.contents]
        pieces = _pieces([(*content, True) for content in contents])
        yield DocumentRequest(index, row.arrival_s, row.output_length, pieces)


def _generated(workload: Documents, seed: int) -> Iterator[DocumentRequest]:
    """Yield prompts: system prompt, documents in random order, unique text between."""
    rng = np.random.default_rng((seed, CHOICE))
    lengths = _spread(
        np.random.default_rng((seed, LENGTH)),
        workload.document_tokens,
        workload.num_documents,
    )
    base = int.from_bytes(sha256(b"%d" % seed).digest()[:4], "little") << 49
    glue = GLUE_CONTENT | base
    for index in range(workload.num_requests):
        contents = [(base, workload.system_tokens, True)]
        chosen = rng.choice(
            workload.num_documents, workload.documents_per_request, replace=False
        )
        glues = _spread(rng, workload.glue_tokens, len(chosen) + 1)
        for document, between in zip(chosen.tolist(), glues, strict=False):
            contents.append((glue := glue + 1, between, False))
            contents.append((base + 1 + document, lengths[document], True))
        contents.append((glue := glue + 1, glues[-1], False))
        yield DocumentRequest(index, None, 0, _pieces(contents))


def _spread(rng: np.random.Generator, mean: int, count: int) -> list[int]:
    """Return uniformly distributed lengths from 0.5 to 1.5 of a mean."""
    half = mean // 2
    drawn: list[int] = rng.integers(mean - half, mean + half + 1, count).tolist()
    return drawn


def _pieces(contents: Sequence[tuple[int, int, bool]]) -> tuple[DocumentPiece, ...]:
    pieces = []
    start = 0
    for content, num_tokens, is_document in contents:
        pieces.append(DocumentPiece(content, start, num_tokens, is_document))
        start += num_tokens
    return tuple(pieces)


@dataclass(slots=True)
class ContentReuse:
    """Contents that an infinite cache of whole contents would reuse."""

    num_asked: int = 0
    num_prefix: int = 0
    """Contents in a prefix that an earlier request had, too."""
    num_anywhere: int = 0
    """Contents that an earlier request had at any position."""


def count_contents(workload: Documents, seed: int) -> ContentReuse:
    """Return the reuse in a workload, in contents, unique text included."""
    counted = ContentReuse()
    seen: set[int] = set()
    beginnings: set[bytes] = set()
    for request in requests(workload, seed):
        names = [piece.content for piece in request.pieces]
        counted.num_asked += len(names)
        counted.num_anywhere += sum(name in seen for name in names)
        seen.update(names)
        begun, is_known = b"", True
        for name in names:
            begun = sha256(begun + name.to_bytes(16, "little")).digest()
            is_known = is_known and begun in beginnings
            counted.num_prefix += is_known
            beginnings.add(begun)
    return counted
