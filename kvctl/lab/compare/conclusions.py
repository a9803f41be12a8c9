"""What a result or a comparison says, in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvctl.console import duration
from kvctl.lab.compare.comparison import Comparison, Count, CountVerdict, Timing
from kvctl.lab.compare.fail_rules import span
from kvctl.lab.compare.significance import Verdict
from kvctl.lab.config.copy_settings import CopyRow
from kvctl.lab.results.result import Result


def of_result(result: Result) -> str:
    """Say what a run showed."""
    if result.problems:
        return f"{result.name} failed: {result.problems[0]}."
    counts, rates = result.counts, result.hit_rates
    cut = ", until it was interrupted" if result.interrupted else ""
    if result.copies:
        return f"Every byte was right{cut}: {_of_copies(result.copies)}."
    checked = "Every byte was right" if counts.retrieved_bytes else "Nothing came back"
    return (
        f"{checked}{cut}: {rates.by_token:.0%} of the tokens "
        f"came from the cache, where an endless one gives {rates.ideal_by_token:.0%}, "
        f"{_answer(result)}."
    )


def _answer(result: Result) -> str:
    """Say what a load of its kind is played for."""
    load, documents = result.load, result.documents
    if documents and result.counts.tokens:
        share = documents.tokens_hit / result.counts.tokens
        return f"and {share:.0%} where documents count at any position"
    if load and load.faults:
        times = [one.recovered_s for one in load.faults if one.recovered_s is not None]
        failed = sum(one.requests_failed for one in load.faults)
        over = f"over after {duration(max(times))} at most" if times else "not over"
        return f"and {len(load.faults)} faults, {over}, failed {failed:,} requests"
    if load and load.saturated_at is not None:
        return f"and up to {load.saturated_at:,.3g} requests a second it kept up"
    if load and load.ttft:
        half = duration(load.ttft.p50_s)
        return f"and half of the first tokens came within {half}"
    return f"at {result.throughput.requests_per_s:,.3g} requests a second"


def _of_copies(rows: Sequence[CopyRow]) -> str:
    stores, retrieves = ([row.store for row in rows], [row.retrieve for row in rows])
    said = (
        f"stores reached {min(stores):.0%} to {max(stores):.0%} of a plain copy, "
        f"retrieves {min(retrieves):.0%} to {max(retrieves):.0%}"
    )
    slower = [one for row in rows if (one := row.product_slowdown) is not None]
    if slower:
        said += f", and slowed a matrix product by {max(slower):.0%} at most"
    return said


def of_comparison(comparison: Comparison) -> str:
    """Say which side does better, and where."""
    base, new = comparison.base.label, comparison.new.label
    found = [
        f"{said} in {_list(names)}"
        for said, names in (
            ("slower", _timings(comparison, Verdict.WORSE)),
            ("faster", _timings(comparison, Verdict.BETTER)),
            ("worse", _counts(comparison, CountVerdict.WORSE)),
            ("better", _counts(comparison, CountVerdict.BETTER)),
        )
        if names
    ]
    if found:
        return f"{new} is {_list(found)} than {base}."
    changed = _counts(comparison, CountVerdict.DIFFERS)
    if changed:
        return f"{new} does other work than {base}: {_list(changed)} differ."
    return _nothing_found(comparison)


def _nothing_found(comparison: Comparison) -> str:
    base, new = comparison.base.label, comparison.new.label
    total = len(comparison.timings)
    unsure = [
        name
        for name, timing in comparison.timings.items()
        if timing.effect.verdict is Verdict.CANNOT_TELL
    ]
    if total and all(one.effect.low is None for one in comparison.timings.values()):
        return f"Too few runs to judge {new} against {base}: repeat it."
    if unsure:
        return (
            f"Between {new} and {base} no difference was found; for {len(unsure)} of "
            f"{total} operations more runs would tell."
        )
    if total:
        return f"{new} is as fast as {base}, and counts the same."
    return f"{new} and {base} have no operation in common."


def _timings(comparison: Comparison, verdict: Verdict) -> list[str]:
    return [
        f"{name} ({change(timing)})"
        for name, timing in comparison.timings.items()
        if timing.effect.verdict is verdict
    ]


def _counts(comparison: Comparison, verdict: CountVerdict) -> list[str]:
    return [
        words(name)
        for name, count in comparison.counts.items()
        if count.verdict is verdict
    ]


def _list(names: Sequence[str]) -> str:
    """Join as people do: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def words(name: str) -> str:
    """Write a field's name as words."""
    return name.replace("_", " ")


def change(timing: Timing) -> str:
    """Write a ratio as people say it: `+12 %`, `2.3 times as long`."""
    ratio = timing.effect.ratio
    if ratio >= 2:
        return f"{ratio:.1f} times as long"
    if ratio <= 0.5:
        return f"{1 / ratio:.1f} times as fast"
    return f"{ratio - 1:+.1%}"


def bounds(timing: Timing) -> str:
    """Write the interval of a ratio; a dash where there are too few runs for one."""
    effect = timing.effect
    if effect.low is None or effect.high is None:
        return "-"
    return f"{effect.low - 1:+.1%} to {effect.high - 1:+.1%}"


def spans(count: Count) -> str:
    """Write both sides of a count."""
    return f"{span(*count.base)} -> {span(*count.new)}"


def problems(results: Iterable[Result]) -> list[str]:
    """Say what was wrong with the runs themselves, each once."""
    return list(dict.fromkeys(line for one in results for line in one.problems))
