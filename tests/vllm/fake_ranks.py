"""Simulated ranks: the content of their blocks and the chunks stored for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from kvcore.errors import ChunksMissing
from kvcore.keys import ExtraKey
from kvcore.protocol import RegisterKVCache, RetrieveReply, StoreReply
from kvcore.vllm.connector_config import ConnectorConfig
from kvcore.vllm.connector_worker import ConnectorWorker, Registration
from kvcore.vllm.server_link import EngineIdentity
from tests.vllm.scripted_link import LinkCall, ScriptedLink

BLOCK = 2

Tokens = tuple[int, ...]
Extras = tuple[ExtraKey, ...]


class KV(NamedTuple):
    """Content of a block: the inputs that determine its KV, from the first token on."""

    weights: int
    extras: Extras
    tokens: Tokens

    def covers(self, other: KV) -> bool:
        """Return whether it has the other's weights and tokens, and possibly more."""
        end = len(other.tokens)
        return (
            self.weights == other.weights
            and self.tokens[:end] == other.tokens
            and extras_before(self.extras, end) == other.extras
        )


CORRUPT = KV(-1, (), ())


def extras_before(extras: Extras, end: int) -> Extras:
    """Return the extra keys that start before token `end`."""
    return tuple(extra for extra in extras if extra.start < end)


def without_reset(extras: Extras) -> Extras:
    """Return the extra keys without the one that the connector adds by a reset."""
    return tuple(one for one in extras if not one.material.startswith(b"reset"))


def kv_of(weights: int, extras: Extras, tokens: Sequence[int], end: int) -> KV:
    """Return the content of a block that ends with tokens[:end]."""
    return KV(weights, extras_before(without_reset(extras), end), tuple(tokens[:end]))


class Blocks:
    """The engine's blocks with their reference counts."""

    def __init__(self) -> None:
        self.refs: Counter[int] = Counter()
        self.held: Counter[int] = Counter()

    def take(self) -> int:
        """Return an unused block with one reference."""
        block = next(b for b in range(1, 1000) if not self.refs[b])
        self.refs[block] = 1
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a reference to blocks in use."""
        assert all(self.refs[block] > 0 for block in blocks)
        self.refs.update(blocks)
        self.held.update(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one reference from each."""
        self.held.subtract(blocks)
        assert all(count >= 0 for count in self.held.values())
        self.refs.subtract(blocks)


class Rank:
    """A worker side, its blocks' content, and the chunks stored for this rank."""

    def __init__(
        self, config: ConnectorConfig, number: int, num_groups: int, chunk_size: int
    ) -> None:
        self.link = ScriptedLink(chunk_size)
        self.worker = ConnectorWorker(config, EngineIdentity("engine", b"key"))
        self.worker._link = cast(Any, self.link)
        request = RegisterKVCache(
            f"engine:{number}", "engine", "model", 1, number, (), ()
        )
        self.worker._registration = Registration(request, tuple(range(num_groups)))
        self.content: dict[int, KV] = {}
        self.stored: dict[tuple[Extras, Tokens], int] = {}
        """Weights that computed each chunk, by the chunk's extra keys and tokens."""

    def has(self, call: LinkCall, end: int) -> bool:
        """Return whether the server has the chunk that ends at token `end`."""
        return (extras_before(call.extras, end), call.tokens[:end]) in self.stored

    def is_right(self, ids: Sequence[int], whole: KV, end: int) -> bool:
        """Return whether blocks contain tokens[:end]; the last one may contain more."""
        return all(
            self.content.get(ids[i], CORRUPT).covers(
                kv_of(
                    whole.weights, whole.extras, whole.tokens, min(end, (i + 1) * BLOCK)
                )
            )
            for i in range(-(-end // BLOCK))
        )

    def check_store(self, call: LinkCall) -> int:
        """Return the version of the weights that computed a store's blocks.

        Raises:
            AssertionError: a block does not contain the KV of its tokens.
        """
        seen = set()
        for ids in call.blocks:
            assert len(ids) == (call.end - call.start) // BLOCK
            for i, block in enumerate(ids, call.start // BLOCK):
                if block >= 0:
                    held = self.content[block]
                    end = (i + 1) * BLOCK
                    assert held == kv_of(held.weights, call.extras, call.tokens, end)
                    seen.add(held.weights)
        assert len(seen) == 1
        return seen.pop()

    def end_store(self, call: LinkCall, outcome: Any) -> None:
        """Complete a store; assert that its blocks are unchanged."""
        weights = self.check_store(call)
        if outcome not in ("ok", "short"):
            call.future.set_exception(outcome("scripted"))
            return
        size = self.link.chunk_size
        for end in range(call.start + size, call.end + 1, size):
            lo, hi = (end - size - call.start) // BLOCK, (end - call.start) // BLOCK
            if all(block >= 0 for ids in call.blocks for block in ids[lo:hi]):
                key = extras_before(call.extras, end), call.tokens[:end]
                self.stored.setdefault(key, weights)
        call.future.set_result(StoreReply(0, 0, 0))

    def end_retrieve(self, call: LinkCall, outcome: Any) -> bool:
        """Complete a retrieve; return whether it wrote all blocks."""
        size = self.link.chunk_size
        ends = range(call.start + size, call.end + 1, size)
        if outcome == "ok" and not all(self.has(call, end) for end in ends):
            outcome = ChunksMissing
        for ids in call.blocks:
            for i, block in enumerate(ids):
                if block >= 0 and i * BLOCK >= call.skip:
                    self.content[block] = CORRUPT
                    if outcome == "ok":
                        self.content[block] = self._loaded(call, i)
        num_tokens = call.end - call.start - call.skip
        if outcome == "ok":
            call.future.set_result(RetrieveReply(num_tokens))
        elif outcome == "short":
            call.future.set_result(RetrieveReply(num_tokens - 1))
        else:
            call.future.set_exception(outcome("scripted"))
        return bool(outcome == "ok")

    def _loaded(self, call: LinkCall, index: int) -> KV:
        """Return what the server writes into the load's block at `index`."""
        size = self.link.chunk_size
        end = call.start + (index + 1) * BLOCK
        chunk_end = -(-end // size) * size
        key = extras_before(call.extras, chunk_end), call.tokens[:chunk_end]
        return kv_of(self.stored[key], call.extras, call.tokens, end)
