"""Simulated workers with a copying client, and checks of their caches."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcore.errors import (
    BadRequest,
    ChunksMissing,
    DeadlineExceeded,
    KVError,
    TokensNeeded,
    Unavailable,
)
from kvcore.keys import SessionKey
from kvcore.protocol import RegisterKVCache
from kvcore.worker.copying_client import CopyingClient
from tests.engine.engine_model import (
    CHUNK,
    IDENTS,
    NUM_BLOCKS,
    SHAPES,
    PartOf,
    content,
    extras_of,
    hashes_of,
    tokens_of,
)
from tests.engine.manual_threads import Strand
from tests.worker.copying_fixture import Killed, ManualConnection

MODEL = "pair"
BLOCK = 2
BLOCKS_PER_CHUNK = CHUNK // BLOCK
POISON = 255

EXPECTED_ERRORS = (
    BadRequest,  # `skip` exceeds the range.
    ChunksMissing,
    DeadlineExceeded,
    Killed,
    TokensNeeded,
    Unavailable,
)


def expected_bytes(prompt: int, chunk: int) -> np.ndarray[Any, Any]:
    """Return the bytes of a prompt's chunk, `[planes, tokens, bytes]`."""
    ident = IDENTS[hashes_of(MODEL, 1, prompt)[chunk]]
    return content(ident, PartOf(0, 0, 0))


def key_of(prompt: int) -> SessionKey:
    """Return the session of a prompt."""
    return SessionKey("c", f"r{prompt}")


@dataclass(eq=False)
class Call:
    """A running store or retrieve."""

    kind: str
    prompt: int
    start: int
    end: int
    skip: int
    timeout_s: float
    has_null: bool
    blocks: list[int] = field(default_factory=list)
    future: Future[Any] = field(default_factory=Future)
    strand: Strand | None = None

    @property
    def chunks(self) -> list[tuple[int, list[int]]]:
        """Return the index in the prompt and the blocks of every chunk."""
        return [
            (
                self.start + index,
                self.blocks[BLOCKS_PER_CHUNK * index : BLOCKS_PER_CHUNK * (index + 1)],
            )
            for index in range(self.end - self.start)
        ]


class Worker:
    """A worker process with at most one store and one retrieve."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = CopyingClient(name, timeout_s=20)
        self.connection: ManualConnection = self.client._connection  # type: ignore[assignment]
        self.calls: dict[str, Call] = {}
        shape = SHAPES[MODEL][0]
        dims = (shape.num_planes, NUM_BLOCKS, BLOCK, shape.width)
        self.memory = np.full(dims, POISON, np.uint8)
        self.register()

    def register(self) -> None:
        """Register the cache, replacing an earlier registration."""
        group = SHAPES[MODEL][0].group(0, BLOCK, 0)
        request = RegisterKVCache(self.name, "c", MODEL, 1, 0, (), (group,))
        self.client.register_kv_cache(request, (self.memory.reshape(-1),))

    def begin(self, call: Call) -> bool:
        """Start a call; return whether there were enough free blocks."""
        taken = {block for other in self.calls.values() for block in other.blocks}
        free = [block for block in range(NUM_BLOCKS) if block not in taken]
        needed = BLOCKS_PER_CHUNK * (call.end - call.start)
        if call.kind in self.calls or len(free) < needed:
            return False
        call.blocks = free[:needed][::-1]
        for chunk, rows in call.chunks:
            self.memory[:, rows] = POISON
            if call.kind == "store":
                filled = expected_bytes(call.prompt, chunk)
                self.memory[:, rows] = filled.reshape(-1, BLOCKS_PER_CHUNK, BLOCK, 2)
        call.strand = Strand(lambda: self._run(call), call.future)
        self.calls[call.kind] = call
        self.resume(call)
        return True

    def _run(self, call: Call) -> None:
        tokens = np.frombuffer(tokens_of(call.prompt, 0, call.end * CHUNK), "<u4")
        is_store = call.kind == "store"
        rest = {} if is_store else {"skip_first_n_tokens": call.skip}
        blocks = [*call.blocks[:-1], -1] if is_store and call.has_null else call.blocks
        try:
            result = getattr(self.client, call.kind)(
                key_of(call.prompt),
                self.name,
                call.start * CHUNK,
                call.end * CHUNK,
                [blocks],
                tokens,
                extras=extras_of(call.prompt),
                timeout_s=call.timeout_s,
                **rest,
            )
        except (KVError, Killed) as error:
            call.future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - a defect, asserted in `check`
            call.future.set_exception(AssertionError(repr(error)))
        else:
            call.future.set_result(result)

    def resume(self, call: Call) -> None:
        """Resume a call until its next pause."""
        assert call.strand is not None
        call.strand.resume()
        if call.strand.is_done:
            del self.calls[call.kind]
            self.check(call)

    def check(self, call: Call) -> None:
        """Assert a valid result, and that a retrieve wrote all bytes or none."""
        error = call.future.exception()
        assert error is None or isinstance(error, EXPECTED_ERRORS), error
        if call.kind == "store" or isinstance(error, Killed):
            return
        for chunk, rows in call.chunks:
            found = self.memory[:, rows].reshape(self.memory.shape[0], CHUNK, -1)
            expected = expected_bytes(call.prompt, chunk).copy()
            skipped = min(max(call.skip - (chunk - call.start) * CHUNK, 0), CHUNK)
            expected[:, :skipped] = POISON
            is_untouched = error is not None and (found == POISON).all()
            assert is_untouched or (found == expected).all()
