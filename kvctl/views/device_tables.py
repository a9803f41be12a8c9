"""The GPUs that a server copies from and to, and how fast each way was found to be."""

from __future__ import annotations

from collections.abc import Sequence

from kvcore.status import CopyRates, DeviceStatus, PieceRate
from kvctl.console import Table, duration, size


def build_tables(devices: Sequence[DeviceStatus]) -> list[Table | str]:
    """Return a table of the devices, and one of the rates that choose the ways."""
    return [_devices(devices), _rates(devices)] if devices else []


def _devices(devices: Sequence[DeviceStatus]) -> Table:
    columns = ("GPU", "name", ">caches", ">staging", "copies by way")
    rows = tuple(
        (
            one.uuid,
            one.name,
            str(one.num_caches),
            size(one.staging_bytes),
            "\n".join(f"{name}: {count:,}" for name, count in one.copies.items()),
        )
        for one in devices
    )
    return Table("GPUs", columns, rows)


def _rates(devices: Sequence[DeviceStatus]) -> Table:
    columns = ("GPU", "direction", ">link", ">one copy", ">staged", "batched", "packed")
    rows = tuple(
        _row(one.name, direction, rates)
        for one in devices
        for direction, rates in (
            ("to host", one.rates.to_host),
            ("to device", one.rates.to_device),
        )
    )
    return Table("how fast copies were found to be", columns, rows)


def _row(name: str, direction: str, rates: CopyRates) -> tuple[str, ...]:
    return (
        name,
        direction,
        _speed(rates.link_bytes_s),
        duration(rates.start_s),
        duration(rates.staged_start_s) if rates.kernels else "no kernels",
        _by_size(rates.batched),
        _by_size(rates.kernels),
    )


def _by_size(rates: Sequence[PieceRate]) -> str:
    return "\n".join(f"{size(one.piece_bytes)}: {_speed(one.bytes_s)}" for one in rates)


def _speed(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.1f} GB/s"
