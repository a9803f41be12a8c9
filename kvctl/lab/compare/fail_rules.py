"""Rules that define a regression, such as `worse,lookup>5%`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvcore.errors import SetupError
from kvctl.lab.compare.comparison import Comparison
from kvctl.lab.compare.significance import Verdict

DEFAULT = "worse,counts"
HELP = (
    "comma-separated rules for a regression: `worse` (a timing is significantly "
    "worse), `counts` (a count is worse or, with equal settings, differs), "
    "`OPERATION>N%` (significantly worse, by more than N %)"
)
_MORE_THAN = re.compile(r"\s*([a-z_0-9]+)\s*>\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True, slots=True)
class _FailRule:
    text: str
    operation: str | None = None
    ratio: float = 1.0


class FailRules:
    """Rules of one `--fail-on` expression, checked at construction."""

    def __init__(self, expression: str) -> None:
        rules = [rule.strip() for rule in expression.split(",")]
        self._rules = [_parse(rule) for rule in rules if rule]

    def find_regressions(self, comparison: Comparison) -> list[str]:
        """Return one line per regression; empty if the comparison passes.

        Raises:
            SetupError: a rule names an operation that was not compared.
        """
        return [line for rule in self._rules for line in _apply(rule, comparison)]


def _parse(text: str) -> _FailRule:
    if text in ("worse", "counts"):
        return _FailRule(text)
    match = _MORE_THAN.fullmatch(text)
    if match is None:
        raise SetupError(f"--fail-on {text}: {HELP}")
    return _FailRule(text, match[1], 1 + float(match[2]) / 100)


def _apply(rule: _FailRule, comparison: Comparison) -> Iterator[str]:
    if rule.text == "counts":
        for name, count in comparison.counts.items():
            if count.verdict in comparison.failing_verdicts:
                yield f"{name}: {count.text}"
        return
    known = ", ".join(comparison.timings)
    if rule.operation is not None and rule.operation not in comparison.timings:
        raise SetupError(f"--fail-on {rule.text}: unknown operation; known are {known}")
    for name, timing in comparison.timings.items():
        effect = timing.effect
        applies = rule.operation in (None, name)
        if applies and effect.verdict is Verdict.WORSE and effect.ratio > rule.ratio:
            yield f"{name} takes {effect.ratio:.2f} times as long"
