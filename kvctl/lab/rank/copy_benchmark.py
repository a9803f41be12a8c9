"""Makes the calls of a scenario's `copies`, in ranks, and puts them together.

A rank gets a cache of its own for each setting, in which a chunk has so many bytes and
its pieces so many, and calls in it as in `alone`. Several ranks do it at the same time.
The driver adds what the server's process had to compute for them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from kvcore.errors import KVError, SetupError
from kvcore.protocol import RegisterKVCache
from kvctl.lab.latency_samples import LatencySamples
from kvctl.lab.process_messages import (
    EnginePlan,
    MeasureCopies,
    MeasuredAlone,
    MeasuredCopies,
)
from kvctl.lab.rank.cache_factory import make_cache, register
from kvctl.lab.rank.isolated_calls import CallerIdentity, IsolatedCaller
from kvctl.lab.systems.system_interface import Client
from kvctl.lab.workload.copy_settings import Copies, CopyRow, Setting

if TYPE_CHECKING:
    from kvctl.lab.rank.gpu_load import MatrixProducts

_CPUCLOCK_SCHED = 2
CACHE_CALLS = 2
"""A cache holds the blocks of so many calls."""


def measure_copies(
    client: Client,
    plan: EnginePlan,
    place: int,
    task: MeasureCopies,
    begin: Callable[[], None],
) -> MeasuredCopies:
    """Be one worker of a setting; `begin` returns when all of them are warm.

    Raises:
        KVError: a call failed.
        SetupError: a matrix product is asked for, and there is no torch.
    """
    copies = plan.scenario.copies or Copies()
    with _seat(client, plan, place, task.setting, copies) as seat:
        scattered = task.setting.order == "scattered"
        soloist = IsolatedCaller(
            seat, copies.chunks, task.seed, scattered=scattered, both=True
        )
        before: Counter[str] = Counter()

        def begin_all() -> None:
            begin()
            before.update(seat.cache.ways())

        if not copies.busy:
            return _done(seat, soloist.play(copies.rounds, begin_all), before)
        with _products(plan.scenario.device) as products:
            quiet = products.rate()
            done = soloist.play(copies.rounds, begin_all)
            return _done(seat, done, before, (quiet, products.rate_in(soloist.spans)))


def _products(device: str) -> MatrixProducts:
    try:
        from kvctl.lab.rank.gpu_load import MatrixProducts
    except ImportError as error:
        raise SetupError(f"copies.busy = true: {error}") from None
    return MatrixProducts(device)


def _done(
    seat: CallerIdentity,
    done: MeasuredAlone,
    before: Counter[str],
    products: tuple[float, float] | None = None,
) -> MeasuredCopies:
    return MeasuredCopies(
        done.num_bytes,
        seat.chunk_bytes,
        done.samples,
        done.bytes_wrong,
        products,
        dict(Counter(seat.cache.ways()) - before),
    )


@contextmanager
def _seat(
    client: Client, plan: EnginePlan, place: int, setting: Setting, copies: Copies
) -> Iterator[CallerIdentity]:
    """Register a cache of the setting for as long as the block runs."""
    geometry = setting.geometry(copies.chunk, client.chunk_size)
    chunk_blocks = client.chunk_size // geometry.block_size
    num_blocks = CACHE_CALLS * copies.chunks * chunk_blocks
    instance_id = f"{plan.engine_id}/copies-{place}"
    cache = make_cache(
        plan.scenario.device,
        f"kvlab-{plan.engine_id}-{place}-copies",
        geometry.groups(num_blocks, 0, 1),
        place,
    )
    request = RegisterKVCache(
        instance_id=instance_id,
        engine_id=plan.engine_id,
        model=f"{geometry.model}@{plan.model}",
        world_size=1,
        rank=0,
        handles=cache.handles,
        groups=cache.groups,
    )
    try:
        yield CallerIdentity(
            client,
            cache,
            [cache.pattern(0, 0, chunk_blocks)],
            request.model,
            1,
            plan.engine_id,
            instance_id,
            register(client, request, cache).chunk_bytes,
            geometry.block_size,
        )
    finally:
        with suppress(KVError):
            client.unregister_kv_cache(instance_id)
        cache.close()


def make_row(
    setting: Setting,
    done: Sequence[MeasuredCopies],
    *,
    server_s: float | None,
    ways: Mapping[str, int],
) -> CopyRow:
    """Put the workers of a setting together."""
    num_bytes, chunk_bytes = done[0].num_bytes, done[0].chunk_bytes
    times = LatencySamples.merge(one.samples for one in done).summary()
    each = [one.samples.summary() for one in done]
    calls = [one["store"].p50_s + one["retrieve"].p50_s for one in each]
    # Both at once are two calls.
    num_calls = 4 * sum(one["both"].count for one in each)
    num_chunks = num_calls * num_bytes / chunk_bytes
    rates = [one.products_per_s for one in done if one.products_per_s]
    return CopyRow(
        setting=setting,
        call_bytes=num_bytes,
        chunk_bytes=chunk_bytes,
        store_gb_per_s=num_bytes / times["store"].p50_s / 1e9,
        retrieve_gb_per_s=num_bytes / times["retrieve"].p50_s / 1e9,
        store=times["plain_store"].p50_s / times["store"].p50_s,
        retrieve=times["plain_retrieve"].p50_s / times["retrieve"].p50_s,
        both_gb_per_s=2 * num_bytes / times["both"].p50_s / 1e9,
        both=times["plain_both"].p50_s / times["both"].p50_s,
        spread=max(calls) / min(calls) - 1,
        server_s_per_chunk=server_s / num_chunks if server_s is not None else None,
        ways=dict(sum((Counter(one.ways) for one in done), Counter(ways))),
        product_slowdown=(
            1 - sum(beside for _, beside in rates) / sum(alone for alone, _ in rates)
            if rates
            else None
        ),
    )


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, user and system.

    By its clock, numbered as clock_getcpuclockid(3) does: /proc has ticks of 10 ms.
    """
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
