"""`kvctl inspect`: output is derived from declarations."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console

from kvcore.errors import ERRORS, SetupError
from kvcore.protocol import BootToken, StatusReply
from kvcore.status import (
    DeviceStatus,
    InstanceStatus,
    L1Status,
    LeaseStatus,
    TicketStatus,
)
from kvcore.wire import REQUESTS
from kvctl import console
from kvctl.commands import inspect
from kvctl.lab.config.model_geometry import PRESETS
from kvctl.views import protocol_tables as protocol
from kvctl.views import status_tables as status
from kvctl.views.layout_tables import ContiguousRuns, LayoutTables
from tests.cuda.cuda_fixture import published

ROOT = Path(__file__).resolve().parents[2]


def test_the_protocol_s_page_is_up_to_date() -> None:
    """`make docs` was run after the last change of a request."""
    assert (ROOT / "docs/protocol.md").read_text() == protocol.render_markdown()


def test_the_protocol_s_page_names_every_request_and_error() -> None:
    """The page is generated from the declared requests and errors."""
    page = protocol.render_markdown()
    for kind in REQUESTS.values():
        assert f"### {kind.name}\n" in page
        assert kind.fingerprint in page
        for field in kind.request.__struct_fields__:
            assert f"| {field} |" in page
    assert all(f"| {code} |" in page for code in ERRORS)


def test_the_protocol_s_tables_are_the_page_s(capsys) -> None:
    """The terminal shows the same requests."""
    inspect.protocol(markdown=False)
    shown = capsys.readouterr().out
    assert all(name in shown for name in REQUESTS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_layout(name: str, capsys) -> None:
    """Axes, parts, runs, bytes per chunk and chunks per GiB of every known model."""
    inspect.layout(preset=name)
    shown = capsys.readouterr().out
    for word in (
        "axes",
        "parts of a chunk",
        "runs",
        "bytes per chunk",
        "chunks per GiB",
    ):
        assert word in shown


def test_bytes_per_chunk_follow_from_the_model(capsys) -> None:
    """256 tokens x 32 layers x K and V x 8 heads x 128 x 2 bytes are 32 MiB."""
    inspect.layout(preset="llama-3.1-8b")
    assert "bytes per chunk: 32.0 MiB per rank" in capsys.readouterr().out


def test_the_pieces_of_a_copy_are_counted() -> None:
    """Each block of a plane is one piece; adjacent pieces are merged."""
    cache = PRESETS["llama-3.1-8b"].groups(64, 0, 1)
    page = LayoutTables("x", cache.groups, cache.handle_bytes, 1, 256)
    layout = page.layouts()[0]
    assert ContiguousRuns.of(layout) == ContiguousRuns(
        run_bytes=16 * 8 * 128 * 2, num_scattered=64 * 16, num_adjacent=64
    )


STATUS = StatusReply(
    version="1",
    address="tcp://127.0.0.1:5555",
    pid=7,
    boot=BootToken(1),
    chunk_size=256,
    uptime_s=3,
    num_clients=2,
    num_sessions=1,
    l1=L1Status(1 << 30, 1 << 28, 65536, 3, 6, 1, 0),
    instances=(
        InstanceStatus(
            instance_id="worker-0",
            engine_id="engine-0",
            model="some-model",
            world_size=2,
            rank=1,
            pid=8,
            groups=("4 layers of tokens",),
            group_fingerprints=("f",),
            group_descriptions=(),
            registered_bytes=1 << 30,
            chunk_bytes=1 << 20,
        ),
    ),
    leases=(LeaseStatus("engine-0", "request-9", "some-model", 3, (0, 1), 1.5, 58.5),),
    num_leases=2,
    tickets=(TicketStatus("engine-0/1", "request-8", "reserved", 5, 5 << 20, 90.25),),
    num_tickets=3,
    counters={"lookups": 1234567},
)


def test_a_server_s_status_shows_owner_and_age_of_leases(capsys) -> None:
    """Output has registrations with layouts, L1 use, sessions, leases and counters."""
    console.show(*status.build_tables(STATUS))
    shown = capsys.readouterr().out
    for word in (
        "1 session,", "25.0% of 1.0 GiB", "worker-0", "1 of 2", "4 layers of tokens",
        "copied by workers (1 of 3)", "request-8", "reserved", "5.0 MiB", "90.2 s",
        "leases (1 of 2)", "request-9", "1.5 s", "58.5 s", "0 1", "1,234,567",
    ):  # fmt: skip
        assert word in shown


def test_brackets_are_not_markup_in_watch_mode(capsys, monkeypatch) -> None:
    """A bar's brackets are printed as text on a terminal that is redrawn."""
    drawn = partial(Console, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(console, "_console", drawn)
    with console.live(*status.build_tables(STATUS)):
        pass
    assert "L1 [########......................] 25.0%" in capsys.readouterr().out


def test_a_narrow_terminal_folds_and_cuts_nothing(capsys, monkeypatch) -> None:
    """Names are not broken in 80 columns; other cells continue on the next line."""
    monkeypatch.setattr(console, "_console", partial(Console, width=80))
    inspect.config()
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "wire.max_requests_per_client" in shown
    assert "…" not in shown


def test_gpus_are_shown_with_their_rates(capsys) -> None:
    """Measured rates by direction and piece size, and copies by method."""
    copies = {"staged_to_host": 1234}
    card = DeviceStatus("GPU-1", "H100", 2, 32 << 20, copies, published())
    console.show(*status.build_device_tables([card]))
    shown = capsys.readouterr().out
    for word in (
        "GPU-1", "H100", "32.0 MiB", "staged_to_host: 1,234", "to device", "60 us",
        "54.0 GB/s", "16.0 KiB: 7.0 GB/s",
    ):  # fmt: skip
        assert word in shown
    assert status.build_device_tables([]) == []
    assert status.build_device_tables([card])[0] in status.build_tables(
        replace(STATUS, devices=(card,))
    )


def test_an_unknown_instance_is_named() -> None:
    """The error lists the registered instances."""
    with pytest.raises(inspect.SetupError, match=r"--instance w: .*are worker-0"):
        inspect._instance(STATUS, "w")
    with pytest.raises(inspect.SetupError, match=f"registered at {STATUS.address}"):
        inspect._instance(replace(STATUS, instances=()), None)
    assert inspect._instance(STATUS, None).instance_id == "worker-0"


def test_a_live_registration_s_layout_needs_no_handle_sizes() -> None:
    """The server has checked the sizes; the tables use one entry per handle."""
    cache = PRESETS["small-hybrid"].groups(4, 0, 1)
    one = replace(STATUS.instances[0], group_descriptions=cache.groups)
    assert len(inspect._unbounded(one)) == len(cache.handle_bytes)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (1 << 40, "1.0 TiB")],
)
def test_sizes_have_a_suitable_unit(num_bytes: int, text: str) -> None:
    """The unit depends on the size."""
    assert console.size(num_bytes) == text


def test_an_error_stays_on_one_line(capsys) -> None:
    """Line breaks in a message are replaced, so that callers can read lines."""
    console.error("first\n  second")
    assert capsys.readouterr().err == "first second\n"


def test_options_of_the_other_kind_of_layout_are_refused() -> None:
    """A preset has no instance; a server determines block and world size."""
    with pytest.raises(SetupError, match="--instance x: needs --server"):
        inspect.layout(preset="tiny-llama", address=None, instance="x")
    with pytest.raises(SetupError, match="need --preset"):
        inspect.layout(preset=None, address="tcp://127.0.0.1:1", world_size=2)
