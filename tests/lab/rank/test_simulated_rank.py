"""A simulated rank: its counts with a correct, a faulty, and a lost server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from kvcore.errors import ChunksMissing, KVError, SetupError, Unavailable
from kvcore.keys import SessionKey
from kvcore.protocol import RegisterReply, RetrieveReply, StoreReply
from kvctl.lab.config.model_geometry import RankCache
from kvctl.lab.config.scenario import ModelConfig, Scenario
from kvctl.lab.config.workload_config import Chat
from kvctl.lab.engine import simulated_scheduler as scheduler
from kvctl.lab.process_messages import EnginePlan, RunRequest
from kvctl.lab.rank import simulated_rank as worker
from kvctl.lab.rank.registered_cache import make_cache
from kvctl.lab.rank.simulated_rank import COPY_EVERY, SimulatedRank

CHUNK = 256
CHUNK_BLOCKS = 16
HASHES = b"".join(sha256(bytes([i])).digest() for i in range(3))


class FakeClient:
    """A server of one rank, which keeps copies of stored blocks."""

    chunk_size = CHUNK
    server = None

    def __init__(self) -> None:
        self.rank: SimulatedRank | None = None
        self.kept: list[np.ndarray[Any, Any]] = []
        self.error: KVError | None = None
        self.after_retrieve: Callable[[], None] = lambda: None
        self.retrieved: list[np.ndarray[Any, Any]] = []

    def register_kv_cache(self, _request: object) -> RegisterReply:
        """Accept any cache."""
        return RegisterReply(("x",), 1000)

    def unregister_kv_cache(self, instance_id: str) -> None:
        """Do nothing."""

    def store(
        self, _s: SessionKey, _i: str, start: int, end: int, blocks: Any, _tokens: Any
    ) -> StoreReply:
        """Keep copies of the blocks of each group."""
        if self.error:
            raise self.error
        assert self.rank
        views = self.rank.cache.views
        self.kept = [v[ids].copy() for v, ids in zip(views, blocks, strict=True)]
        chunks = (end - start) // CHUNK
        return StoreReply(chunks * len(blocks), 0, 0)

    def retrieve(
        self, _s: SessionKey, _i: str, start: int, end: int, blocks: Any, _tokens: Any
    ) -> RetrieveReply:
        """Write back the kept blocks, except null blocks."""
        if self.error:
            raise self.error
        assert self.rank
        self.retrieved = blocks
        for view, ids, kept in zip(
            self.rank.cache.views, blocks, self.kept, strict=True
        ):
            there = ids >= 0
            view[ids[there]] = kept[: len(ids)][there]
        self.after_retrieve()
        return RetrieveReply(end - start)


def make(preset: str) -> tuple[SimulatedRank, FakeClient]:
    """Return a rank with a fake client."""
    scenario = Scenario(ModelConfig(preset), Chat(), cache_blocks=96)
    plan = EnginePlan("", 0, f"test-{os.getpid()}", "m", 0, scenario)
    client = FakeClient()
    rank = SimulatedRank(plan, 0, client)  # type: ignore[arg-type]
    client.rank = rank
    return rank, client


@pytest.fixture
def rank_and_client() -> Iterator[tuple[SimulatedRank, FakeClient]]:
    """A rank of a small Llama that has stored three chunks."""
    rank, client = make("tiny-llama")
    stored = rank.execute(task(0, 3))
    assert stored.errors == ()
    assert (stored.tally.parts_stored, stored.tally.store_bytes) == (3, 3000)
    yield rank, client
    rank.close()


def task(hit: int, end: int, first_block: int = 0, groups: int = 1) -> RunRequest:
    """Return a request of `end` chunks, `hit` of which are found."""
    ids = np.arange(first_block, first_block + end * CHUNK_BLOCKS, dtype=np.int32)
    hashes = HASHES[: end * 32]
    session = SessionKey("e", "r")
    return RunRequest(
        session, hit * CHUNK, end * CHUNK, hashes, (ids.tobytes(),) * groups
    )


def test_correct_bytes_are_not_counted_as_wrong(
    rank_and_client: tuple[SimulatedRank, FakeClient],
) -> None:
    """Chunks that are retrieved into other blocks have no wrong byte."""
    rank, _ = rank_and_client
    found = rank.execute(task(3, 3, first_block=48))
    assert (found.errors, found.tally.bytes_wrong) == ((), 0)
    assert found.tally.retrieve_bytes == 3 * CHUNK * rank.cache.views[0][0].nbytes // 16
    assert set(found.durations) == {"retrieve"}


def test_requests_of_less_than_a_chunk_move_nothing(
    rank_and_client: tuple[SimulatedRank, FakeClient],
) -> None:
    """There are no plain copies either."""
    rank, _ = rank_and_client
    for _ in range(2 * COPY_EVERY):
        found = rank.execute(task(0, 0))
        assert (found.errors, found.tally.copy_bytes) == ((), 0)


def test_one_wrong_byte_is_counted(
    rank_and_client: tuple[SimulatedRank, FakeClient],
) -> None:
    """A corrupted byte is detected."""
    rank, client = rank_and_client
    view = rank.cache.views[0]

    def corrupt() -> None:
        view[50, 0, 1, 3, 1, 0] ^= 0xFF

    client.after_retrieve = corrupt
    assert rank.execute(task(3, 3, first_block=48)).tally.bytes_wrong == 1


def test_a_retrieve_that_writes_nothing_is_all_wrong(
    rank_and_client: tuple[SimulatedRank, FakeClient],
) -> None:
    """Also into blocks with the correct bytes, because they are poisoned before."""
    rank, client = rank_and_client
    client.kept = [kept[:0] for kept in client.kept]
    client.retrieve = lambda *_: RetrieveReply(0)  # type: ignore[method-assign]
    found = rank.execute(task(3, 3))
    assert found.tally.bytes_wrong > 0.9 * found.tally.retrieve_bytes


def test_a_failed_retrieve_is_an_error_and_all_is_stored(
    rank_and_client: tuple[SimulatedRank, FakeClient],
) -> None:
    """All chunks are computed, as by an engine, and stored."""
    rank, client = rank_and_client

    def fail(*_: object) -> RetrieveReply:
        raise ChunksMissing("gone")

    client.retrieve = fail  # type: ignore[method-assign, assignment]
    found = rank.execute(task(2, 3))
    assert found.errors == ("retrieve: chunks_missing: gone",)
    assert found.tally.parts_stored == 3


def test_a_lost_server_ends_the_request(
    rank_and_client: tuple[SimulatedRank, FakeClient],
) -> None:
    """The reply to the scheduler has the reason."""
    rank, client = rank_and_client
    client.error = Unavailable("gone")
    found = rank.execute(task(1, 3))
    assert found.unavailable == "gone"
    assert found.durations == {}


def test_blocks_outside_the_window_are_null() -> None:
    """Of a hit of 768 tokens, a window of 512 needs the last 511 tokens' blocks."""
    rank, client = make("tiny-hybrid")
    try:
        rank.execute(task(0, 3, groups=2))
        found = rank.execute(task(3, 3, first_block=48, groups=2))
        assert found.tally.bytes_wrong == 0
        full, window = client.retrieved
        assert (full >= 0).all()
        assert (window < 0).tolist() == [True] * 16 + [False] * 32
    finally:
        rank.close()


@pytest.mark.parametrize(
    "begin",
    [
        lambda plan, control: worker.run(plan, control, 0, []),
        lambda plan, control: scheduler.run(plan, control, []),
    ],
)
def test_a_failure_after_the_end_of_the_driver_is_silent(
    begin: Callable[[EnginePlan, Connection], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first failure ends the run; other processes fail without a driver."""

    def refuse(*_: object) -> None:
        raise SetupError("no room")

    monkeypatch.setattr(worker, "connect", refuse)
    monkeypatch.setattr(scheduler, "connect", refuse)
    scenario = Scenario(ModelConfig(preset="tiny-llama"), Chat())
    plan = EnginePlan("", 0, "test-0", "m", 0, scenario)
    driver, control = Pipe()
    begin(plan, control)
    assert b"no room" in driver.recv_bytes()
    driver.close()
    begin(plan, control)


def test_a_cache_on_a_gpu_needs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the error is one line, as for any invalid scenario."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "kvctl.lab.rank.gpu_cache", raising=False)
    with pytest.raises(SetupError, match=r"cuda.*torch.*docs/gpu\.md"):
        make_cache("cuda", "unused", RankCache((), ()), 0)
