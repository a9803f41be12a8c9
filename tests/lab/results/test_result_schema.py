"""The published schema of a result."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvctl.lab.results.result import RESULT_VERSION, schema

PUBLISHED = Path(__file__).parents[3] / "docs" / "result.schema.json"


def test_the_published_schema_is_the_one_in_force() -> None:
    """`make docs` writes it from the Structs; it was run after the last change."""
    made = msgspec.json.decode(msgspec.json.encode(schema()))
    assert msgspec.json.decode(PUBLISHED.read_bytes()) == made
    assert RESULT_VERSION == 1
