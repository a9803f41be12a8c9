"""`KVCtlConnector`, which vLLM loads from its option `kv_connector_module_path`.

It translates between vLLM's objects and `ConnectorScheduler` (scheduler side) or
`ConnectorWorker` (worker side) and holds no other logic. It implements the methods of
vLLM's `KVConnectorBase_V1` that 0.29 to 0.32 have; docs/vllm.md lists them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.platforms import current_platform

from kvcore.errors import KVError, SetupError
from kvcore.protocol import RegisterKVCache
from kvcore.vllm.connector_config import parse_config
from kvcore.vllm.connector_scheduler import ConnectorScheduler, EngineRequest
from kvcore.vllm.connector_worker import Collected, ConnectorWorker, Registration
from kvcore.vllm.kv_cache_groups import (
    EngineGroup,
    check_engine,
    describe_caches,
    engine_groups,
)
from kvcore.vllm.memory_handles import PrivateCacheMemory, SharedCacheMemory
from kvcore.vllm.model_identity import extra_keys, is_cacheable, model_identity
from kvcore.vllm.server_link import EngineIdentity, ServerLink
from kvcore.vllm.step_metadata import OpId, ScheduledRequest, StepPlan

log = logging.getLogger(__name__)

CAN_FAIL_REQUESTS = hasattr(base, "KVConnectorTransferResults")
"""Whether a failed load can name its request (vLLM 0.30); several groups need it."""


class StepMetadata(base.KVConnectorMetadata):  # type: ignore[misc]
    """A step's plan, sent from the scheduler to the workers."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan


@dataclass
class StepReport(base.KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Completed operations, sent from the workers to the scheduler."""

    acks: Counter[OpId] = field(default_factory=Counter)
    failed: set[str] = field(default_factory=set)

    def aggregate(self, other: StepReport) -> StepReport:
        """Add another rank's report."""
        return StepReport(self.acks + other.acks, self.failed | other.failed)


class _VllmBlockPool:
    """`BlockPool` over vLLM's block pool."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def hold(self, blocks: Sequence[int]) -> None:
        self._pool.touch([self._pool.blocks[block] for block in blocks])

    def release(self, blocks: Sequence[int]) -> None:
        # In reverse order, so that vLLM evicts the tail first.
        self._pool.free_blocks([self._pool.blocks[block] for block in reversed(blocks)])


class KVCtlConnector(base.KVConnectorBase_V1, base.SupportsHMA):  # type: ignore[misc]
    """vLLM connector that shares an engine's KV cache through `kvctl serve`.

    vLLM creates one in its scheduler process and one in each worker process.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: Any, kv_cache_config: Any
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._config = parse_config(transfer.kv_connector_extra_config or {})
        # vLLM gives an engine's processes the same random id, and no other process.
        self._engine = EngineIdentity.derive(str(transfer.engine_id))
        parallel = vllm_config.parallel_config
        self._world_size = (
            parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        )
        self._scheduler: ConnectorScheduler | None = None
        self._worker: ConnectorWorker | None = None
        self._memory = (
            PrivateCacheMemory()
            if self._config.driver == "worker"
            else SharedCacheMemory()
        )
        self._collected = Collected()
        # A failed load must be recomputed; vLLM's default can fail the request.
        transfer.kv_load_failure_policy = "recompute"
        try:
            self._groups = _groups(vllm_config, kv_cache_config)
        except KVError as error:
            self._groups = ()
            log.warning("no KV cache: %s", error)
            return
        kv_layout = getattr(kv_cache_config, "kv_cache_layout", None)
        self._model = self._config.model or model_identity(
            vllm_config, _platform(), kv_layout
        )
        if role == base.KVConnectorRole.SCHEDULER:
            self._scheduler = self._create_scheduler()
        else:
            self._rank = parallel.rank % self._world_size
            self._worker = ConnectorWorker(self._config, self._engine)

    def _create_scheduler(self) -> ConnectorScheduler:
        return ConnectorScheduler(
            ServerLink(self._config, self._engine, "scheduler"),
            self._config,
            engine_id=self._engine.id,
            model=self._model,
            world_size=self._world_size,
            groups=self._groups,
        )

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a lost store only causes a later miss. vLLM reads it at the start."""
        return False

    def shutdown(self) -> None:
        """Close the connection. vLLM calls it when the engine shuts down."""
        # Before the client: vLLM may kill this process while that waits for the server.
        self._memory.close()
        for side in (self._scheduler, self._worker):
            if side is not None:
                side.close()
        self._scheduler = self._worker = None

    # -- worker side ------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Register the worker's cache. vLLM calls it once, after allocating the cache.

        If the cache cannot be shared, log a warning and serve without a KV cache: the
        worker side still acknowledges the stores that the scheduler side plans.
        """
        if self._worker is None:
            return
        try:
            self._worker.register(self._registration(kv_caches))
        except KVError as error:
            log.warning("no KV cache: %s", error)

    def _registration(self, kv_caches: Mapping[str, torch.Tensor]) -> Registration:
        config = self._vllm_config
        described = describe_caches(
            self._groups,
            kv_caches,
            self._kv_cache_config.num_blocks,
            share=self._memory.share,
            replicate_mla=config.parallel_config.pipeline_parallel_size == 1,
        )
        request = RegisterKVCache(
            instance_id=f"{self._engine.id}:{self._rank}",
            engine_id=self._engine.id,
            model=self._model,
            world_size=self._world_size,
            rank=self._rank,
            handles=described.handles,
            groups=described.groups,
        )
        return Registration(
            request,
            described.sources,
            tuple(self._memory.arrays),
            self._memory.record_event,
        )

    def bind_connector_metadata(self, connector_metadata: StepMetadata) -> None:
        """Receive the step's plan. vLLM calls it before each forward pass."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.add_tokens(connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Submit the step's loads. vLLM calls it before the forward pass.

        vLLM schedules a request only after its load has ended.
        """
        del forward_context, kwargs
        if self._worker is not None:
            self._worker.load(self._plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: loads are not per layer. vLLM calls it in each layer."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: stores are not per layer. vLLM calls it in each layer."""

    def wait_for_save(self) -> None:
        """Submit the step's stores; the scheduler side holds their blocks.

        vLLM calls it after each forward pass.
        """
        if self._worker is not None:
            self._worker.store(self._plan)
            self._worker.forget(self._plan.ended)

    def get_finished(
        self, finished_req_ids: set[str]
    ) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose loads ended.

        vLLM before 0.30 calls it after each step. Stores are not reported here: the
        scheduler side counts acknowledgements.
        """
        del finished_req_ids
        self._collect()
        return None, self._collected.loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Return the requests whose loads ended, and which of them failed.

        vLLM calls it after each step, in place of `get_finished` (0.30).
        """
        del finished_req_ids
        self._collect()
        by_request = len(self._groups) > 1
        return base.KVConnectorTransferResults(
            finished_recving=self._collected.loaded,
            failed_recving=self._collected.failed if by_request else set(),
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks of failed loads, if there is one cache group.

        vLLM calls it after each step and recomputes those blocks.
        """
        return self._collected.failed_blocks if len(self._groups) == 1 else set()

    def build_connector_worker_meta(self) -> StepReport | None:
        """Return the step's completed operations. vLLM calls it after each step."""
        collected = self._collected
        if not collected.acks and not collected.failed:
            return None
        return StepReport(collected.acks, collected.failed)

    def _collect(self) -> None:
        if self._worker is not None:
            self._collected = self._worker.collect()

    @property
    def _plan(self) -> StepPlan:
        metadata = self._connector_metadata
        return metadata.plan if isinstance(metadata, StepMetadata) else StepPlan()

    # -- scheduler side ---------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Set the pool whose blocks are held during copies. vLLM calls it once."""
        if self._scheduler is not None:
            self._scheduler.pool = _VllmBlockPool(gpu_block_pool)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens can be loaded, and whether the load is asynchronous.

        The count is None while the lookup is in progress. vLLM calls it for each
        waiting request in each step.
        """
        if self._scheduler is None or not is_cacheable(request):
            return 0, False
        matched = self._scheduler.get_num_matched_tokens(
            EngineRequest(
                request.request_id, request.all_token_ids, partial(extra_keys, request)
            ),
            num_computed_tokens,
        )
        return matched, bool(matched)

    def update_state_after_alloc(
        self, request: Any, blocks: Any, num_external_tokens: int
    ) -> None:
        """Plan a load into the allocated blocks. vLLM calls it after allocation."""
        if self._scheduler is not None:
            self._scheduler.update_after_alloc(
                request.request_id, blocks.get_block_ids(), num_external_tokens
            )

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Return the step's plan. vLLM calls it once per step, after scheduling."""
        if self._scheduler is None:
            return StepMetadata(StepPlan())
        return StepMetadata(self._scheduler.step(_scheduled(scheduler_output)))

    def update_connector_output(self, connector_output: Any) -> None:
        """Process the workers' reports. vLLM calls it after each step."""
        report = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(report, StepReport):
            self._scheduler.acknowledge(report.acks, report.failed)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Stop tracking a finished request. vLLM calls it when a request ends.

        Blocks with copies in progress stay held by the scheduler side.
        """
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Stop tracking a finished request. vLLM calls it when a request ends.

        Blocks with copies in progress stay held by the scheduler side.
        """
        del block_ids
        if self._scheduler is not None:
            self._scheduler.finish(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Make all KV stored so far unreachable for this engine: its weights changed.

        vLLM calls it from `reset_prefix_cache(reset_connector=True)`.
        """
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    def has_pending_push_work(self) -> bool:
        """Return whether vLLM must keep stepping because copies are in progress."""
        return self._scheduler is not None and self._scheduler.num_ops > 0


def _scheduled(output: Any) -> list[ScheduledRequest]:
    """Convert vLLM's `SchedulerOutput`: new requests first, then running ones."""
    new = output.num_scheduled_tokens
    started = [
        ScheduledRequest(
            one.req_id, one.num_computed_tokens, new[one.req_id], one.block_ids, True
        )
        for one in output.scheduled_new_reqs
    ]
    cached = output.scheduled_cached_reqs
    running = zip(
        cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
    )
    return started + [
        ScheduledRequest(
            req_id, num_computed, new[req_id], blocks, req_id in cached.resumed_req_ids
        )
        for req_id, num_computed, blocks in running
    ]


def _groups(config: VllmConfig, kv_cache_config: Any) -> tuple[EngineGroup, ...]:
    """Return the engine's cache groups.

    Raises:
        KVError: they cannot be cached; the message gives the reason.
    """
    check_engine(config)
    groups = engine_groups(kv_cache_config)
    if len(groups) > 1 and not CAN_FAIL_REQUESTS:
        raise SetupError(
            f"vLLM {vllm.__version__} cannot recompute a failed load of a model with "
            "several cache groups; 0.30 can"
        )
    return groups


def _platform() -> str:
    """Return vLLM's version and the device: they determine a block's inner layout."""
    names = [vllm.__version__, str(current_platform.device_type)]
    if current_platform.device_type == "cpu":
        names.append(torch.backends.cpu.get_cpu_capability())
    else:
        names.append(str(current_platform.get_device_name()))
    return " ".join(names)
