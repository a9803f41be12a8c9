"""A comparison as a sentence, tables, Markdown and JUnit XML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from kvctl.console import Table, duration, markdown, plural
from kvctl.lab.compare.comparison import Comparison, CountVerdict, Timing
from kvctl.lab.compare.significance import Verdict

SUITE = "kvctl regress"


def build_tables(comparison: Comparison) -> Iterator[Table | str]:
    """Yield tables and lines for `console.show`."""
    yield describe_comparison(comparison)
    yield from (table for table in _tables(comparison) if table.rows)
    yield _equal_counts(comparison)
    for key, (base, new) in comparison.settings.items():
        yield f"setting {key}: {base} -> {new}"
    for note in comparison.notes:
        yield f"note: {note}"


def render_markdown(comparison: Comparison) -> str:
    """Return a comparison as Markdown."""
    sentence, *parts = build_tables(comparison)
    return markdown(f"**{sentence}**", *parts)


def _tables(comparison: Comparison) -> Iterator[Table]:
    sides = (f">{comparison.base.label}", f">{comparison.new.label}")
    timings = tuple(
        (
            name,
            duration(timing.base_s),
            duration(timing.new_s),
            format_change(timing),
            format_interval(timing),
            timing.effect.verdict,
        )
        for name, timing in comparison.timings.items()
    )
    title = f"timings, p50, {format_runs(comparison)}"
    yield Table(title, ("", *sides, ">change", ">interval", ""), timings)
    figures = tuple(
        (words(name), *("-" if value is None else f"{value:,.3g}" for value in pair))
        for name, pair in comparison.figures.items()
    )
    yield Table("throughput (no test)", ("", *sides), figures)
    counts = tuple(
        (words(name), count.text, count.verdict)
        for name, count in comparison.counts.items()
        if count.verdict is not CountVerdict.SAME
    )
    yield Table("counts that differ", ("", "", ""), counts)


def _equal_counts(comparison: Comparison) -> str:
    verdicts = [count.verdict for count in comparison.counts.values()]
    same = verdicts.count(CountVerdict.SAME)
    return f"{same} of {len(verdicts)} counts are equal"


def render_junit(comparison: Comparison, baseline_failures: Sequence[str]) -> str:
    """Return a JUnit XML suite: one case per operation, count and baseline.

    'cannot tell' is a skipped case, not a failure.
    """
    suite = Element("testsuite", name=SUITE)
    for name, timing in comparison.timings.items():
        case = SubElement(suite, "testcase", classname="timing", name=name)
        message = f"{format_change(timing)} ({format_interval(timing)})"
        if timing.effect.verdict is Verdict.WORSE:
            SubElement(case, "failure", message=message)
        elif timing.effect.verdict is Verdict.CANNOT_TELL:
            SubElement(case, "skipped", message=f"cannot tell: {message}")
    for name, count in comparison.counts.items():
        case = SubElement(suite, "testcase", classname="count", name=name)
        if count.verdict in comparison.failing_verdicts:
            SubElement(case, "failure", message=count.text)
    case = SubElement(suite, "testcase", classname="baseline", name="counts")
    if baseline_failures:
        SubElement(case, "failure", message="; ".join(baseline_failures))
    for name, path in (
        ("tests", "testcase"),
        ("failures", "testcase/failure"),
        ("skipped", "testcase/skipped"),
    ):
        suite.set(name, str(len(suite.findall(path))))
    indent(suite)
    return tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


# -- sentences --------------------------------------------------------------------


def describe_comparison(comparison: Comparison) -> str:
    """Return which side is better, and where, as one sentence."""
    base, new = comparison.base.label, comparison.new.label
    found = [
        f"{adjective} in {_join(names)}"
        for adjective, names in (
            ("slower", _timings(comparison, Verdict.WORSE)),
            ("faster", _timings(comparison, Verdict.BETTER)),
            ("worse", _counts(comparison, CountVerdict.WORSE)),
            ("better", _counts(comparison, CountVerdict.BETTER)),
        )
        if names
    ]
    if found:
        return f"{new} is {_join(found)} than {base}."
    changed = _counts(comparison, CountVerdict.DIFFERS)
    if changed:
        return f"{new} and {base} did different work: {_join(changed)} differ."
    return _describe_no_difference(comparison)


def _describe_no_difference(comparison: Comparison) -> str:
    base, new = comparison.base.label, comparison.new.label
    effects = [timing.effect for timing in comparison.timings.values()]
    if not effects:
        return f"{new} and {base} have no operation in common."
    if all(effect.low is None for effect in effects):
        return f"Too few runs to compare {new} with {base}: raise --repeat."
    unclear = sum(effect.verdict is Verdict.CANNOT_TELL for effect in effects)
    if unclear:
        return (
            f"No difference found between {new} and {base}; {unclear} of "
            f"{len(effects)} operations need more runs."
        )
    return f"{new} is as fast as {base}, with equal counts."


def _timings(comparison: Comparison, verdict: Verdict) -> list[str]:
    return [
        f"{name} ({format_change(timing)})"
        for name, timing in comparison.timings.items()
        if timing.effect.verdict is verdict
    ]


def _counts(comparison: Comparison, verdict: CountVerdict) -> list[str]:
    return [
        words(name)
        for name, count in comparison.counts.items()
        if count.verdict is verdict
    ]


def _join(names: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def words(name: str) -> str:
    """Return a field's name as words."""
    return name.replace("_", " ")


def format_runs(comparison: Comparison) -> str:
    """Return `12 pairs`, or `12 runs per side` without pairs."""
    if comparison.in_pairs:
        return plural(comparison.base.num_runs, "pair")
    return f"{plural(comparison.base.num_runs, 'run')} per side"


def format_change(timing: Timing) -> str:
    """Return a ratio as `+12.0%` or `2.3 times as long`."""
    ratio = timing.effect.ratio
    if ratio >= 2:
        return f"{ratio:.1f} times as long"
    if ratio <= 0.5:
        return f"{1 / ratio:.1f} times as fast"
    return f"{ratio - 1:+.1%}"


def format_interval(timing: Timing) -> str:
    """Return the interval of a ratio; a dash where there are too few runs."""
    effect = timing.effect
    if effect.low is None or effect.high is None:
        return "-"
    return f"{effect.low - 1:+.1%} to {effect.high - 1:+.1%}"
