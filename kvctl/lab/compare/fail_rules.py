"""What a comparison must not show: rules such as `worse,lookup>5%`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvcore.errors import SetupError
from kvctl.lab.compare.comparison import Comparison, CountVerdict
from kvctl.lab.compare.significance import Verdict

DEFAULT = "worse,counts"
HELP = (
    "what is a regression, comma-separated: `worse` (a timing judged so), `counts` "
    "(one that is worse or, in one scenario, differs), `OPERATION>N%` (judged worse, "
    "and by more than that)"
)
_MORE_THAN = re.compile(r"\s*([a-z_0-9]+)\s*>\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class _FailRule:
    text: str
    operation: str | None = None
    ratio: float = 1.0


class FailRules:
    """Rules, checked when made; `broken` applies them."""

    def __init__(self, expression: str) -> None:
        parts = [part.strip() for part in expression.split(",")]
        self._rules = [_rule(part) for part in parts if part]

    def broken(self, comparison: Comparison) -> list[str]:
        """Say what the comparison shows that it must not; nothing: it passes.

        Raises:
            SetupError: a rule names an operation that was not compared.
        """
        return [line for rule in self._rules for line in _broken(rule, comparison)]


def _rule(text: str) -> _FailRule:
    if text in ("worse", "counts"):
        return _FailRule(text)
    match = _MORE_THAN.fullmatch(text)
    if match is None:
        raise SetupError(f"--fail-on {text}: {HELP}")
    return _FailRule(text, match[1], 1 + float(match[2]) / 100)


def _broken(rule: _FailRule, comparison: Comparison) -> Iterator[str]:
    if rule.text == "counts":
        yield from _counts(comparison)
        return
    known = ", ".join(comparison.timings)
    if rule.operation is not None and rule.operation not in comparison.timings:
        raise SetupError(f"--fail-on {rule.text}: operations are {known}")
    for name, timing in comparison.timings.items():
        effect = timing.effect
        asked = rule.operation in (None, name)
        if asked and effect.verdict is Verdict.WORSE and effect.ratio > rule.ratio:
            yield f"{name} takes {effect.ratio:.2f} times as long"


def _counts(comparison: Comparison) -> Iterator[str]:
    """Other settings or another system may well store other amounts."""
    failing = {CountVerdict.WORSE}
    if not comparison.settings:
        failing.add(CountVerdict.DIFFERS)
    for name, count in comparison.counts.items():
        if count.verdict in failing:
            yield f"{name} went from {span(*count.base)} to {span(*count.new)}"


def span(low: int, high: int) -> str:
    """Write a count, or the range that it varies in."""
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
