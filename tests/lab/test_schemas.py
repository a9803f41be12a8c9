"""Published JSON Schemas."""

from __future__ import annotations

from kvctl.lab.config.scenario import publish


def test_docstrings_lose_their_indentation() -> None:
    """Applies at any depth, except to a property named `description`."""
    made = {"anyOf": [{"description": "One.\n\n    Two."}], "description": {"a": 1}}
    published = publish(made)
    assert published.pop("$schema")
    assert published == {
        "anyOf": [{"description": "One.\n\nTwo."}],
        "description": {"a": 1},
    }
