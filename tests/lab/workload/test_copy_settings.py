"""Settings of the copy benchmark, their caches, and the merged rows."""

from __future__ import annotations

from array import array

import pytest
from msgspec.structs import replace

from kvcore.errors import SetupError
from kvcore.option_structs import ByteSize
from kvctl.lab.config.copy_settings import Copies, Setting
from kvctl.lab.latency import LatencySamples
from kvctl.lab.process_messages import CallTimes
from kvctl.lab.rank.copy_benchmark import make_row

KIB = 1 << 10


@pytest.mark.parametrize("kib", [4, 8, 16, 24, 32, 256, 2048])
def test_a_chunk_has_pieces_of_the_given_size(kib: int) -> None:
    """The geometry has the piece size and about the chunk size."""
    setting = Setting(kib * KIB, "scattered", 1)
    geometry = setting.geometry(32 << 20, 256)
    assert geometry.piece_bytes(1) == kib * KIB
    assert 256 % geometry.block_size == 0
    chunk_bytes = geometry.token_bytes(1) * 256
    assert 0.75 < chunk_bytes / (32 << 20) < 1.25


def test_settings_vary_one_parameter_at_a_time() -> None:
    """Pieces and orders with the first number of workers; others with one piece."""
    pieces = tuple(ByteSize(kib * KIB) for kib in (4, 32, 256))
    copies = Copies(pieces=pieces, workers=(1, 2, 8))
    settings = list(copies.settings())
    assert len(settings) == 3 * 2 + 2
    assert {setting.workers for setting in settings[:6]} == {1}
    assert settings[6:] == [Setting(32 * KIB, "scattered", number) for number in (2, 8)]


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"pieces": ()}, "pieces"),
        ({"workers": (0,)}, "workers"),
        ({"pieces": (ByteSize(100),)}, "pieces"),
    ],
)
def test_invalid_copy_settings_are_refused(given: dict[str, object], key: str) -> None:
    """The error names the key."""
    with pytest.raises(SetupError, match=f"^{key} ="):
        Copies(**given)  # type: ignore[arg-type]


def done(store_s: float, products: tuple[float, float] | None = None) -> CallTimes:
    """Return times of a worker whose plain copies took half as long as its calls."""
    seconds = {
        "store": store_s, "plain_store": store_s / 2,
        "retrieve": 1.0, "plain_retrieve": 0.5, "both": 2.0, "plain_both": 1.5,
    }  # fmt: skip
    samples = LatencySamples.pack(
        {name: array("d", [s] * 4) for name, s in seconds.items()}
    )
    return CallTimes(10**9, 10**8, samples, 0, products)


def test_a_row_has_shares_spread_and_slowdown() -> None:
    """Medians over workers, spread of the workers, and the server's CPU time."""
    setting = Setting(4 * KIB, "scattered", 2)
    both = [done(1.0, (100, 90)), done(2.0, (100, 80))]
    ways = {"staged_to_host": 7}
    row = make_row(setting, both, server_s=12.0, ways=ways)
    assert row.ways == ways
    both = [replace(one, ways=ways) for one in both]
    assert make_row(setting, both, server_s=None, ways={}).ways == {
        "staged_to_host": 14
    }
    assert row.retrieve_gb_per_s == pytest.approx(1, rel=0.01)
    assert row.retrieve == pytest.approx(0.5, rel=0.01)
    assert row.both == pytest.approx(0.75, rel=0.01)
    assert row.spread == pytest.approx(0.5, rel=0.01)
    assert row.product_slowdown == pytest.approx(0.15)
    # 4 calls per round, of 10 chunks each, in 4 rounds of 2 workers.
    assert row.server_s_per_chunk == pytest.approx(12.0 / (4 * 4 * 2 * 10))
