"""Parts, memory for them, and a tier on each kind of store."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcore.shm import Segment
from kvcore.tiers.tier import Tier
from kvcore.tiers.tier_url import open_tier
from tests.tiers.fake_store import FakeEngine
from tests.tiers.file_tier_parts import RECORD
from tests.tiers.store_servers import (
    Engine,
    FileEngine,
    MooncakeEngine,
    PasswordEngine,
    S3Engine,
    TlsEngine,
    ValkeyEngine,
)

ARENA_BYTES = 64 << 20

_LOCAL = {"fake": FakeEngine, "file": FileEngine}
_REAL = {
    "valkey": ValkeyEngine,
    "valkey-password": PasswordEngine,
    "redis-tls": TlsEngine,
    "s3": S3Engine,
    "mooncake": MooncakeEngine,
}
_KINDS: dict[str, type[Engine]] = _LOCAL | _REAL


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of `engine` with every kind that can do what the test wants."""
    if "engine" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("not_with")
    excluded = marker.args if marker else ()
    kinds = [
        pytest.param(name, marks=[pytest.mark.tiers] if name in _REAL else [])
        for name in _KINDS
        if name not in excluded
    ]
    metafunc.parametrize("engine", kinds, indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A store that is not started yet."""
    engine = _KINDS[request.param](tmp_path)
    yield engine
    engine.kill()


@pytest.fixture(scope="session")
def arena() -> Iterator[Segment]:
    """Memory as L1's, of random bytes; tests write to its second half alone."""
    name = f"kvtest-{os.getpid()}-{secrets.token_hex(4)}"
    with Segment.create(name, ARENA_BYTES, touch=True) as segment:
        segment.array[:] = np.random.default_rng(1).integers(
            0, 256, ARENA_BYTES, np.uint8
        )
        yield segment


@pytest.fixture
def opened(engine: Engine, arena: Segment) -> Iterator[Callable[[], Tier]]:
    """Opens tiers on the engine, with the arena attached, and closes them."""
    tiers: list[Tier] = []

    def open_one() -> Tier:
        tier = (
            engine.open() if isinstance(engine, FakeEngine) else open_tier(engine.url)
        )
        tier.attach(arena.name, arena.array)
        tiers.append(tier)
        return tier

    yield open_one
    engine.kill()  # A tier that waits for a paused one would wait for its timeout.
    for tier in tiers:
        tier.close()


@pytest.fixture
def tier(engine: Engine, opened: Callable[[], Tier]) -> Tier:
    """A tier on an engine that runs."""
    engine.start()
    return opened()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a file tier keeps its files."""
    return tmp_path / "tier"


@pytest.fixture
def open_at(folder: Path) -> Iterator[Callable[..., Tier]]:
    """Opens tiers on the folder with room for some parts, and closes them."""
    tiers: list[Tier] = []

    def open_one(num_parts: int, place: Path = folder) -> Tier:
        url = f"file://{place}?max={num_parts * RECORD}B&retry=0.02&threads=1"
        tiers.append(open_tier(url))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        tier.close()
