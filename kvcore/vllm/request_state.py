"""What the scheduler half knows of a request, from its first lookup to its end."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

from kvcore.keys import ExtraKey, SessionKey
from kvcore.protocol import LookupReply


class EngineRequest(Protocol):
    """A request as the engine has it; `tokens` grows while it runs."""

    @property
    def request_id(self) -> str: ...  # noqa: D102
    @property
    def tokens(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def extras(self) -> tuple[ExtraKey, ...]: ...  # noqa: D102


class BlockPool(Protocol):
    """The engine's blocks. Held ones are not given to another request."""

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a reference to each."""

    def release(self, blocks: Sequence[int]) -> None:
        """Take the reference off again."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """One cache group of the engine, as the scheduler needs to know it."""

    block_size: int
    window: int | None = None
    is_chunked: bool = False
    """Whether windows begin at multiples of `window`, and do not slide."""

    def num_gone(self, num_computed: int) -> int:
        """Count the leading blocks that the engine may have given away by then."""
        if self.window is None:
            return 0
        if self.is_chunked:
            return num_computed // self.window * self.window // self.block_size
        return max(num_computed - self.window + 1, 0) // self.block_size


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request of a step: `num_new` tokens after the `num_computed` first ones."""

    request_id: str
    num_computed: int
    num_new: int
    blocks: tuple[list[int], ...] | None
    replaces: bool
    """Whether `blocks` stand in place of those known, not after them."""


@dataclass(slots=True)
class Match:
    """A lookup, from its submission until the engine has used the answer."""

    future: Future[LookupReply]
    begun: float
    num_tokens: int
    chunk_size: int
    hit: int = 0
    is_judged: bool = False
    """Whether the answer has been taken in."""

    def is_over(self, valid_s: float) -> bool:
        """Say whether it was answered and that was long ago."""
        return self.future.done() and monotonic() - self.begun > valid_s


@dataclass(slots=True)
class RequestState:
    """What is known of one request."""

    session: SessionKey
    tokens: Sequence[int]
    extras: tuple[ExtraKey, ...]
    match: Match | None = None
    blocks: list[list[int]] = field(default_factory=list)
    num_stored: int = 0
    """Tokens that were found or whose store was ordered; whole chunks."""
    num_told: int = 0
    """Tokens that the workers have."""
    num_looked_up: int = 0
    """Tokens that the server has, as far as is known."""
    num_ops: int = 0
    is_known: bool = False
    """Whether the server has heard of the session."""
    load_failed: bool = False
    finished: bool = False

    def take_blocks(self, one: Scheduled) -> None:
        """Take in the blocks that a step gave the request."""
        if one.blocks is None:
            return
        if one.replaces or not self.blocks:
            self.blocks = [list(ids) for ids in one.blocks]
        else:
            for known, more in zip(self.blocks, one.blocks, strict=True):
                known.extend(more)


@dataclass(slots=True)
class PendingOperation:
    """A load or store that not every rank has acknowledged."""

    tracked: RequestState
    held: list[int]
    num_waiting: int
