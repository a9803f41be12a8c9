"""The published schema of a result."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvctl.lab.results.result import RESULT_VERSION, schema

PUBLISHED = Path(__file__).parents[3] / "docs" / "result.schema.json"


def test_the_published_schema_is_up_to_date() -> None:
    """`make docs` was run after the last change of a Struct."""
    made = msgspec.json.decode(msgspec.json.encode(schema()))
    assert msgspec.json.decode(PUBLISHED.read_bytes()) == made
    assert RESULT_VERSION == 1
