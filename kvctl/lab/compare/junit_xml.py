"""A comparison as JUnit XML, which every CI shows: a case an operation and a count."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from kvctl.lab.compare.comparison import Comparison, CountVerdict
from kvctl.lab.compare.conclusions import bounds, change, spans
from kvctl.lab.compare.significance import Verdict

SUITE = "kvctl regress"


def render(comparison: Comparison, of_baseline: Sequence[str]) -> str:
    """Write the suite; 'cannot tell' is a skipped case, not a failure."""
    suite = Element("testsuite", name=SUITE)
    for name, timing in comparison.timings.items():
        case = SubElement(suite, "testcase", classname="timing", name=name)
        said = f"{change(timing)} ({bounds(timing)})"
        if timing.effect.verdict is Verdict.WORSE:
            SubElement(case, "failure", message=said)
        elif timing.effect.verdict is Verdict.CANNOT_TELL:
            SubElement(case, "skipped", message=f"cannot tell: {said}")
    failing = {CountVerdict.WORSE}
    if not comparison.settings:
        failing.add(CountVerdict.DIFFERS)
    for name, count in comparison.counts.items():
        case = SubElement(suite, "testcase", classname="count", name=name)
        if count.verdict in failing:
            SubElement(case, "failure", message=spans(count))
    case = SubElement(suite, "testcase", classname="baseline", name="counts")
    if of_baseline:
        SubElement(case, "failure", message="; ".join(of_baseline))
    cases = suite.findall("testcase")
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    indent(suite)
    return tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
