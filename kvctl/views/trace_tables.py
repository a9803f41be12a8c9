"""The profile of a trace, and the catalogue of public traces, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import astuple

from kvctl.console import Table, size, sparkline
from kvctl.lab.traces.trace_catalogue import PublicTrace
from kvctl.lab.traces.trace_profile import Lengths, Profile


def build_tables(name: str, format_name: str, profile: Profile) -> list[Table | str]:
    """Return tables and lines for `console.show`."""
    return [
        _headline(name, format_name, profile),
        _lengths(profile),
        _reuse(profile),
        *_plots(profile),
    ]


def _headline(name: str, format_name: str, profile: Profile) -> str:
    sessions = f" in {profile.num_sessions:,} sessions" if profile.num_sessions else ""
    return (
        f"{name}: {format_name}, {profile.num_requests:,} requests{sessions}, "
        f"{_span(profile.span_s)}, up to {profile.most_at_once} at the same time"
    )


def _span(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds:,.0f} s"
    return f"{seconds / 3600:,.1f} h"


def _lengths(profile: Profile) -> Table:
    rows = (("prompts", *_of(profile.prompts)), ("answers", *_of(profile.answers)))
    return Table("tokens", ("", ">all", ">p50", ">p90", ">p99", ">longest"), rows)


def _of(lengths: Lengths) -> tuple[str, ...]:
    return tuple(f"{value:,}" for value in astuple(lengths))


def _reuse(profile: Profile) -> Table:
    sizes = ", ".join(map(str, profile.block_sizes)) or "-"
    anywhere: tuple[tuple[str, str], ...] = ()
    what, label = "blocks", f"blocks of {sizes} tokens"
    if profile.anywhere_hit_rate is not None:
        what = label = "contents"
        anywhere = (("known at any position", f"{profile.anywhere_hit_rate:.3f}"),)
    rows = (
        (label, f"{profile.num_blocks:,}"),
        ("unique", f"{profile.num_unique_blocks:,}"),
        (f"ideal hit rate of {what}", f"{profile.ideal_hit_rate:.3f}"),
        ("ideal hit rate of tokens", f"{profile.ideal_token_hit_rate:.3f}"),
        *anywhere,
    )
    return Table("reuse in one infinite cache (upper bound)", ("", ">"), rows)


def _plots(profile: Profile) -> list[str]:
    powers = range(len(profile.prompt_lengths))
    first = next((power for power in powers if profile.prompt_lengths[power]), 0)
    lengths = profile.prompt_lengths[first:]
    return [
        f"arrivals over time, at most {max(profile.arrivals, default=0):,} per "
        "sixtieth of the span",
        f"  {sparkline(profile.arrivals)}",
        "ideal hit rate over requests, "
        f"at most {max(profile.hit_rates, default=0):.2f}",
        f"  {sparkline(profile.hit_rates)}",
        "prompt lengths, by powers of two, "
        f"{2**first:,} to {2 ** (first + len(lengths)):,} tokens",
        f"  {sparkline(lengths)}",
    ]


def list_catalogue(traces: Sequence[PublicTrace]) -> list[Table]:
    """Return the public traces, and their checksums."""
    rows = tuple(
        (
            one.name,
            one.format,
            one.about,
            one.source,
            one.licence,
            size(one.num_bytes) if one.num_bytes else "unknown",
        )
        for one in traces
    )
    columns = ("trace", "format", "content", "source", "licence", ">size")
    sums = tuple((one.name, one.sha256 or "unknown") for one in traces)
    return [
        Table("public traces", columns, rows),
        Table("as published", ("trace", "sha256"), sums),
    ]
