"""Performance targets of a GPU, and measured values from figures and results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20
CHUNK_BYTES = 32 * MIB
SMALL_BYTES = 24 << 10
"""Scattered pieces up to this size have a lower target."""


@dataclass(frozen=True, slots=True)
class Target:
    """One target. `measured` is the worst of the values that it applies to, or None."""

    what: str
    by: str
    least: float | None
    most: float | None
    measured: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None if nothing was measured."""
        if self.measured is None:
            return None
        if self.least is not None:
            return self.measured >= self.least
        return self.most is not None and self.measured <= self.most

    def __str__(self) -> str:
        met = {True: "met", False: "MISSED", None: "not measured"}[self.is_met]
        asked = f">= {self.least:g}" if self.most is None else f"<= {self.most:g}"
        found = "" if self.measured is None else f"{self.measured:.4g} "
        return f"{self.what} ({self.by}): {found}{asked}, {met}"


Row = Mapping[str, Any]
Value = Callable[[Row], float | None]


def targets_of(
    figures: Mapping[str, Sequence[Any]], results: Sequence[Any]
) -> list[Target]:
    """Return all targets; `figures` by step, `results` as scenarios save them."""
    made = []
    for driver in ("server", "worker"):
        rows = list(rows_of(results, "store_retrieve", driver))
        made += copies_of(rows, driver)
        busy = list(rows_of(results, "busy", driver))
        slowdown = worst(max, busy, lambda row: row["product_slowdown"])
        made.append(Target("matrix product slowed by", driver, None, 0.05, slowdown))
    programs = [
        line["programs_a_launch"]
        for line in figures.get("copies", ())
        if "programs_a_launch" in line
    ]
    sms = 2.0 * programs[0] if programs else None
    made.append(Target("SMs at once", "both", None, 12, sms))
    trips = figures.get("first_byte", ())
    first = max((line["first_byte_s"] for line in trips), default=None)
    what = "s from lookup of 256 chunks to first byte"
    made.append(Target(what, "server", None, 0.002, first))
    return made


def rows_of(results: Sequence[Any], name: str, driver: str) -> Iterator[Row]:
    """Yield the rows of copies of one scenario and driver."""
    for result in results:
        if result["name"].endswith(name) and result["scenario"]["driver"] == driver:
            yield from result["copies"]


def copies_of(rows: Sequence[Row], driver: str) -> Iterator[Target]:
    """Yield the targets of copies of 32 MiB chunks."""
    alone = [row for row in rows if row["setting"]["workers"] == 1]
    small = [row for row in alone if is_small(row)]
    large = [row for row in alone if not is_small(row)]
    for way in ("store", "retrieve"):
        share = worst(min, large, lambda row, way=way: row[way])
        yield Target(f"{way}, share of a plain copy", driver, 0.95, None, share)
    both = worst(min, large, lambda row: row["both"])
    yield Target("both ways at once, share", driver, 0.9, None, both)
    for way in ("store", "retrieve"):
        share = worst(min, small, lambda row, way=way: row[way])
        yield Target(f"{way} of scattered 4 to 24 KiB", driver, 0.85, None, share)
    cpu_s = worst(max, alone, server_s)
    yield Target("server's CPU s for 32 MiB", driver, None, 100e-6, cpu_s)
    many = [row for row in rows if row["setting"]["workers"] == 8]
    spread = worst(max, many, lambda row: row["spread"])
    yield Target("8 workers apart by", driver, None, 0.05, spread)


def is_small(row: Row) -> bool:
    """Return whether pieces are small and scattered."""
    setting = row["setting"]
    return setting["order"] == "scattered" and setting["piece_bytes"] <= SMALL_BYTES


def server_s(row: Row) -> float | None:
    """Return the server's CPU seconds per 32 MiB."""
    each: float | None = row["server_s_per_chunk"]
    return None if each is None else each * CHUNK_BYTES / row["chunk_bytes"]


def worst(
    choose: Callable[[Sequence[float]], float], rows: Sequence[Row], value: Value
) -> float | None:
    """Return the worst value of the rows that have one."""
    found = [each for row in rows if (each := value(row)) is not None]
    return choose(found) if found else None
