"""JSON Schemas as they are published."""

from __future__ import annotations

from inspect import cleandoc
from typing import Any


def publish(made: dict[str, Any]) -> dict[str, Any]:
    """Name the dialect; the same text whichever Python keeps docstrings indented."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_clean(made)}


def _clean(made: Any) -> Any:
    if isinstance(made, dict):
        return {
            key: cleandoc(value)
            if key == "description" and isinstance(value, str)
            else _clean(value)
            for key, value in made.items()
        }
    return [*map(_clean, made)] if isinstance(made, list | tuple) else made
