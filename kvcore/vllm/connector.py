"""`KVCtlConnector`: what vLLM loads by `kv_connector_module_path`.

It translates between vLLM's objects and the adapter's halves, and decides nothing
else. Of vLLM's hooks it uses those that 0.29 to 0.32 have; docs/vllm.md lists them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.platforms import current_platform

from kvcore.errors import KVError, SetupError
from kvcore.keys import ExtraKey
from kvcore.protocol import RegisterKVCache
from kvcore.vllm.connector_config import parse_config
from kvcore.vllm.connector_scheduler import ConnectorScheduler
from kvcore.vllm.connector_worker import Collected, ConnectorWorker, Registration
from kvcore.vllm.kv_cache_groups import (
    EngineGroup,
    GroupShape,
    check_engine,
    describe_caches,
    engine_groups,
)
from kvcore.vllm.model_identity import extra_keys, is_cacheable, model_identity
from kvcore.vllm.server_link import ServerLink
from kvcore.vllm.shared_cache import PrivateCacheMemory, SharedCacheMemory
from kvcore.vllm.step_metadata import OpId, ScheduledRequest, StepPlan

log = logging.getLogger(__name__)

CAN_FAIL_REQUESTS = hasattr(base, "KVConnectorTransferResults")
"""Whether a failed load can name its request, which several groups need (0.30)."""


class StepMetadata(base.KVConnectorMetadata):  # type: ignore[misc]
    """Carries a step's plan from the scheduler to the workers."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan


@dataclass
class StepReport(base.KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Carries what ended on the workers back to the scheduler."""

    acks: dict[OpId, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def aggregate(self, other: StepReport) -> StepReport:
        """Add another rank's report."""
        acks = dict(self.acks)
        for op, num_ranks in other.acks.items():
            acks[op] = acks.get(op, 0) + num_ranks
        return StepReport(acks, self.failed | other.failed)


class _ConnectorRequest:
    """vLLM's request as the scheduler half sees it."""

    def __init__(self, request: Any) -> None:
        self.request_id: str = request.request_id
        self.tokens: Sequence[int] = request.all_token_ids
        self._request = request

    @property
    def extras(self) -> tuple[ExtraKey, ...]:
        return extra_keys(self._request)


class _BlockPool:
    """vLLM's block pool as the scheduler half sees it."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def hold(self, blocks: Sequence[int]) -> None:
        self._pool.touch([self._pool.blocks[block] for block in blocks])

    def release(self, blocks: Sequence[int]) -> None:
        # The tail first: it is evicted first.
        self._pool.free_blocks([self._pool.blocks[block] for block in reversed(blocks)])


class KVCtlConnector(base.KVConnectorBase_V1, base.SupportsHMA):  # type: ignore[misc]
    """Shares the KV cache of a vLLM engine through a `kvctl serve` on its host."""

    def __init__(
        self, vllm_config: VllmConfig, role: Any, kv_cache_config: Any
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._config = parse_config(transfer.kv_connector_extra_config or {})
        self._engine_id = str(transfer.engine_id)
        parallel = vllm_config.parallel_config
        self._world_size = (
            parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        )
        self._scheduler: ConnectorScheduler | None = None
        self._worker: ConnectorWorker | None = None
        is_own = self._config.driver == "worker"
        self._memory: SharedCacheMemory | PrivateCacheMemory = (
            PrivateCacheMemory() if is_own else SharedCacheMemory()
        )
        self._collected = Collected()
        # A missing chunk is computed, whatever the default says about failures.
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
            rank = parallel.rank % self._world_size
            self._worker = ConnectorWorker(self._config, self._engine_id, rank)
            self._rank = rank

    def _create_scheduler(self) -> ConnectorScheduler:
        return ConnectorScheduler(
            ServerLink(
                self._config.address,
                f"{self._engine_id[:40]} scheduler",
                self._config.retry_s,
            ),
            self._config,
            engine_id=self._engine_id,
            model=self._model,
            world_size=self._world_size,
            groups=[
                GroupShape(g.block_size, g.window, g.is_chunked) for g in self._groups
            ],
        )

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is lost is a miss later, nothing worse."""
        return False

    def shutdown(self) -> None:
        """Say goodbye."""
        # First, since vLLM may kill this process while it waits for the server.
        self._memory.close()
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()
        self._scheduler = self._worker = None

    # -- the worker's -----------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Share the cache with the server; without it vLLM goes on as it is."""
        if self._worker is None:
            return
        try:
            self._worker.register(self._registration(kv_caches))
        except KVError as error:
            log.warning("no KV cache: %s", error)
            self._worker = None

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
            instance_id=f"{self._engine_id}:{self._rank}",
            engine_id=self._engine_id,
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
        """Begin a step."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.add_tokens(connector_metadata.plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the step's loads; their requests are in no step until they end."""
        del forward_context, kwargs
        if self._worker is not None:
            self._worker.load(self._plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: loads are not by layer."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: stores are not by layer."""

    def wait_for_save(self) -> None:
        """Begin the step's stores; the scheduler holds their blocks: nobody waits."""
        if self._worker is not None:
            self._worker.store(self._plan)
            self._worker.forget(self._plan.ended)

    def get_finished(
        self, finished_req_ids: set[str]
    ) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose loads ended. Stores are acknowledged by op."""
        del finished_req_ids
        self._collect()
        return None, self._collected.loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Return the requests whose loads ended, and which of them failed."""
        del finished_req_ids
        self._collect()
        by_request = len(self._groups) > 1
        return base.KVConnectorTransferResults(
            finished_recving=self._collected.loaded,
            failed_recving=self._collected.failed if by_request else set(),
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks of failed loads, where a block says which request's."""
        return self._collected.failed_blocks if len(self._groups) == 1 else set()

    def build_connector_worker_meta(self) -> StepReport | None:
        """Report what ended to the scheduler half."""
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

    # -- the scheduler's --------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Take the pool whose blocks are held while they are copied."""
        if self._scheduler is not None:
            self._scheduler.pool = _BlockPool(gpu_block_pool)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Say how many tokens can be loaded; None while the lookup is under way."""
        if self._scheduler is None or not is_cacheable(request):
            return 0, False
        matched = self._scheduler.get_num_matched_tokens(
            _ConnectorRequest(request), num_computed_tokens
        )
        return matched, bool(matched)

    def update_state_after_alloc(
        self, request: Any, blocks: Any, num_external_tokens: int
    ) -> None:
        """Order a load into the blocks that were allocated for it."""
        if self._scheduler is not None:
            self._scheduler.update_after_alloc(
                request.request_id, blocks.get_block_ids(), num_external_tokens
            )

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Plan the step."""
        if self._scheduler is None:
            return StepMetadata(StepPlan())
        return StepMetadata(self._scheduler.step(_scheduled(scheduler_output)))

    def update_connector_output(self, connector_output: Any) -> None:
        """Take in what ended on the workers."""
        report = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(report, StepReport):
            self._scheduler.acknowledge(report.acks, report.failed)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request. Blocks that are still copied are held by themselves."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request. Blocks that are still copied are held by themselves."""
        del block_ids
        if self._scheduler is not None:
            self._scheduler.finish(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Find nothing any more of what was stored so far: the weights have changed."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    def has_pending_push_work(self) -> bool:
        """Keep vLLM stepping until every copy has been acknowledged."""
        return self._scheduler is not None and self._scheduler.num_ops > 0


def _scheduled(output: Any) -> list[ScheduledRequest]:
    """Read a step of vLLM's: new requests first, then those that go on."""
    new = output.num_scheduled_tokens
    scheduled = [
        ScheduledRequest(
            one.req_id, one.num_computed_tokens, new[one.req_id], one.block_ids, True
        )
        for one in output.scheduled_new_reqs
    ]
    cached = output.scheduled_cached_reqs
    for index, req_id in enumerate(cached.req_ids):
        scheduled.append(
            ScheduledRequest(
                req_id,
                cached.num_computed_tokens[index],
                new[req_id],
                cached.new_block_ids[index],
                req_id in cached.resumed_req_ids,
            )
        )
    return scheduled


def _groups(config: VllmConfig, kv_cache_config: Any) -> tuple[EngineGroup, ...]:
    """Read the engine's groups; a `KVError` says why they cannot be cached."""
    check_engine(config)
    groups = engine_groups(kv_cache_config)
    if len(groups) > 1 and not CAN_FAIL_REQUESTS:
        raise SetupError(
            f"vLLM {vllm.__version__} cannot recompute a failed load of a model with "
            "several cache groups; 0.30 can"
        )
    return groups


def _platform() -> str:
    """Name what decides how a block's inside is laid out, and by which kernels."""
    names = [vllm.__version__, str(current_platform.device_type)]
    if current_platform.device_type == "cpu":
        names.append(torch.backends.cpu.get_cpu_capability())
    else:
        names.append(str(current_platform.get_device_name()))
    return " ".join(names)
