"""The copy benchmark of a scenario's `[copies]`: its calls in ranks, and their medians.

Each rank registers a cache per setting, whose chunks and pieces have the setting's
sizes, and makes isolated calls with it. Several ranks may call concurrently. The
driver adds the CPU time of the server's process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from msgspec.structs import replace

from kvcore.errors import SetupError
from kvctl.lab.config.copy_settings import Copies, CopyRow, Setting
from kvctl.lab.latency import LatencySamples
from kvctl.lab.process_messages import CallTimes, EnginePlan
from kvctl.lab.rank.isolated_calls import IsolatedCalls
from kvctl.lab.rank.registered_cache import RegisteredCache
from kvctl.lab.systems.system_interface import Client

if TYPE_CHECKING:
    from kvctl.lab.rank.gpu_load import MatrixProducts

_CPUCLOCK_SCHED = 2
CALLS_PER_CACHE = 2
"""A cache has blocks for two calls, which may be concurrent."""


def measure_copies(
    client: Client,
    plan: EnginePlan,
    index: int,
    setting: Setting,
    seed: int,
    begin: Callable[[], None],
) -> CallTimes:
    """Execute one worker's part of a setting; `begin` waits for the other workers.

    Raises:
        KVError: a call failed.
        SetupError: `busy` is set, and torch is not installed.
    """
    copies = plan.scenario.copies or Copies()
    geometry = setting.geometry(copies.chunk, client.chunk_size)
    chunk_blocks = client.chunk_size // geometry.block_size
    registered = RegisteredCache(
        client,
        plan,
        geometry,
        CALLS_PER_CACHE * copies.chunks * chunk_blocks,
        name=f"copies-{index}",
        model=f"{geometry.model}@{plan.model}",
        world_size=1,
        rank=0,
        index=index,
    )
    with closing(registered):
        scattered = setting.order == "scattered"
        calls = IsolatedCalls(
            registered, copies.chunks, seed, scattered=scattered, both=True
        )
        counts_before: Counter[str] = Counter()

        def begin_all() -> None:
            begin()
            counts_before.update(registered.cache.copy_counts())

        if copies.busy:
            with _matrix_products(plan.scenario.device) as products:
                rate_alone = products.rate()
                times = calls.measure(copies.rounds, begin_all)
                rates = rate_alone, products.rate_in(calls.spans)
        else:
            times, rates = calls.measure(copies.rounds, begin_all), None
        ways = dict(Counter(registered.cache.copy_counts()) - counts_before)
        return replace(times, products_per_s=rates, ways=ways)


def _matrix_products(device: str) -> MatrixProducts:
    try:
        from kvctl.lab.rank.gpu_load import MatrixProducts
    except ImportError as error:
        raise SetupError(f"copies.busy = true: {error}") from None
    return MatrixProducts(device)


def make_row(
    setting: Setting,
    reports: Sequence[CallTimes],
    *,
    server_s: float | None,
    ways: Mapping[str, int],
) -> CopyRow:
    """Return the medians over the workers of a setting.

    `server_s` is the server's CPU time, `ways` its copies by method and direction.
    """
    num_bytes, chunk_bytes = reports[0].num_bytes, reports[0].chunk_bytes
    times = LatencySamples.merge(one.samples for one in reports).summary()
    each = [one.samples.summary() for one in reports]
    call_s = [one["store"].p50_s + one["retrieve"].p50_s for one in each]
    # A round has four calls: two of them are concurrent.
    num_calls = 4 * sum(one["both"].count for one in each)
    num_chunks = num_calls * num_bytes / chunk_bytes
    rates = [one.products_per_s for one in reports if one.products_per_s]
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
        spread=max(call_s) / min(call_s) - 1,
        server_s_per_chunk=server_s / num_chunks if server_s is not None else None,
        ways=dict(sum((Counter(one.ways) for one in reports), Counter(ways))),
        product_slowdown=(
            1 - sum(during for _, during in rates) / sum(alone for alone, _ in rates)
            if rates
            else None
        ),
    )


def cpu_s(pid: int) -> float:
    """Return the CPU time of a process in seconds, user and system.

    It reads the process's CPU clock, whose id is computed as clock_getcpuclockid(3)
    does: /proc has a resolution of 10 ms.

    Raises:
        OSError: there is no such process.
    """
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
