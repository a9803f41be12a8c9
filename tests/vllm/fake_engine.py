"""Fake engine without a model: both connector sides over a cache of known bytes."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcore.keys import ExtraKey
from kvcore.layout import CacheGroup, TensorView
from kvcore.protocol import PosixShm, RegisterKVCache
from kvcore.shm import Segment
from kvcore.vllm.connector_config import ConnectorConfig
from kvcore.vllm.connector_scheduler import ConnectorScheduler
from kvcore.vllm.connector_worker import Collected, ConnectorWorker, Registration
from kvcore.vllm.kv_cache_groups import EngineGroup
from kvcore.vllm.server_link import EngineIdentity, ServerLink
from kvcore.vllm.step_metadata import ScheduledRequest, StepPlan
from tests.system.server_fixture import wait_until

BLOCK = 16
PAGE = 512
NUM_BLOCKS = 64

LONG_TIMEOUTS = {"lookup_timeout_s": 20, "store_timeout_s": 20}
"""Long enough for a busy machine; tests of slow servers set shorter ones."""

_numbers = itertools.count()


@dataclass
class Request:
    """A request with the fields of `EngineRequest`."""

    request_id: str
    tokens: list[int]
    extras: tuple[ExtraKey, ...] = ()

    def make_extras(self) -> tuple[ExtraKey, ...]:
        """Return the extra keys."""
        return self.extras


class Pool:
    """A `BlockPool` that counts references."""

    def __init__(self) -> None:
        self.held: Counter[int] = Counter()

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block."""
        self.held.update(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a reference from each block."""
        self.held.subtract(blocks)
        self.held += Counter()


class FakeEngine:
    """A scheduler side and a worker side; the test runs each step."""

    def __init__(
        self,
        address: str,
        *,
        model: str = "model",
        windows: Sequence[int | None] = (None,),
        **config: object,
    ) -> None:
        number = next(_numbers)
        name = f"kvadapter-{os.getpid()}-{number}"
        self.config = ConnectorConfig(
            address=address,
            **{**LONG_TIMEOUTS, "retry_s": 0.05, **config},  # type: ignore[arg-type]
        )
        self.engine = EngineIdentity.derive(f"engine-{number}")
        group_bytes = NUM_BLOCKS * PAGE
        self.segment = Segment.create(name, group_bytes * len(windows), touch=True)
        self.views = self.segment.array.reshape(len(windows), NUM_BLOCKS, PAGE)
        groups = tuple(
            CacheGroup(
                axes="NP",
                dtype="uint8",
                block_size=BLOCK,
                tensors=(
                    TensorView(0, i * group_bytes, (NUM_BLOCKS, PAGE), (PAGE, 1)),
                ),
                kind="pages",
                window=window,
            )
            for i, window in enumerate(windows)
        )
        handle = PosixShm(name, 0, self.segment.num_bytes)
        request = RegisterKVCache(
            f"{self.engine.id}:0", self.engine.id, model, 1, 0, (handle,), groups
        )
        self.pool = Pool()
        self.link = ServerLink(self.config, self.engine, "scheduler")
        self.scheduler = ConnectorScheduler(
            self.link,
            self.config,
            engine_id=self.engine.id,
            model=model,
            world_size=1,
            groups=[EngineGroup(BLOCK, window) for window in windows],
            pool=self.pool,
        )
        self.worker = ConnectorWorker(self.config, self.engine)
        is_own = self.config.driver == "worker"
        memory = (self.segment.array,) if is_own else ()
        self.worker.register(Registration(request, tuple(range(len(windows))), memory))

    def connect(self) -> FakeEngine:
        """Wait until the server is available to both sides."""
        worker_link = self.worker._link
        assert worker_link is not None
        wait_until(lambda: self.link.server and worker_link.server)
        return self

    def fill(self, blocks: Sequence[int], seed: int) -> None:
        """Write random bytes into blocks of every group."""
        rng = np.random.default_rng(seed)
        self.views[:, blocks] = rng.integers(
            0, 256, (len(self.views), len(blocks), PAGE), np.uint8
        )

    def read(self, blocks: Sequence[int], group: int = 0) -> npt.NDArray[np.uint8]:
        """Return a copy of a group's blocks, uint8 [blocks, PAGE]."""
        return self.views[group, blocks].copy()

    def match(self, request: Request, num_computed: int = 0) -> int:
        """Wait for the lookup; return the number of matched tokens."""
        answers: list[int] = []

        def ask() -> bool:
            answer = self.scheduler.get_num_matched_tokens(request, num_computed)
            if answer is not None:
                answers.append(answer)
            return answer is not None

        wait_until(ask)
        return answers[0]

    def step(self, *scheduled: ScheduledRequest) -> StepPlan:
        """Plan a step and submit its loads and stores."""
        plan = self.scheduler.step(scheduled)
        self.worker.add_tokens(plan)
        self.worker.load(plan)
        self.worker.store(plan)
        self.worker.forget(plan.ended)
        return plan

    def collect(self) -> Collected:
        """Collect completed operations and report them to the scheduler side."""
        collected = self.worker.collect()
        self.scheduler.acknowledge(collected.acks, collected.failed)
        return collected

    def settle(self) -> Collected:
        """Collect until no operation is in progress; return all results."""
        total = Collected()

        def quiet() -> bool:
            one = self.collect()
            total.loaded |= one.loaded
            total.failed |= one.failed
            total.failed_blocks |= one.failed_blocks
            return not self.worker._running

        wait_until(quiet)
        return total

    def compute(self, request: Request, blocks: Sequence[int]) -> None:
        """Compute a whole prompt in one step and wait for its store."""
        matched = self.match(request)
        assert matched == 0
        ids = tuple(list(blocks) for _ in self.views)
        self.scheduler.update_after_alloc(request.request_id, ids, 0)
        self.step(
            ScheduledRequest(request.request_id, 0, len(request.tokens), ids, True)
        )
        self.settle()

    def load(self, request: Request, blocks: Sequence[int]) -> Collected:
        """Load all matched tokens into blocks and wait for it."""
        ids = tuple(list(blocks) for _ in self.views)
        self.scheduler.update_after_alloc(request.request_id, ids, self.match(request))
        self.step()
        return self.settle()

    def close(self) -> None:
        """Close both sides and remove the cache."""
        self.scheduler.close()
        self.worker.close()
        del self.views
        self.segment.unlink()
        self.segment.close()
