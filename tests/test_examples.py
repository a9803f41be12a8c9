"""All examples run to their end and print the expected text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvcore

ROOT = Path(__file__).resolve().parents[1]

EXPECTED = {
    "store_and_retrieve": "1024 tokens retrieved, equal: True",
    "custom_eviction_policy": "chunks in L1: 4",
    "custom_tier": "1024 tokens retrieved, equal: True",
    "blend_documents": "keys rotated: True",
    "load_test": "0 wrong bytes",
    "torch_paged_cache": "512 tokens, equal: True",
}
MARKS = {
    "load_test": pytest.mark.long,
    "custom_eviction_policy": pytest.mark.long,
    "torch_paged_cache": pytest.mark.torch,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in EXPECTED]
)
def test_an_example_runs(name: str) -> None:
    """It runs as its first line says, from any folder."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        cwd="/",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout


def test_every_example_is_run() -> None:
    """`EXPECTED` lists all examples; `local_server` is a helper of them."""
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found == {*EXPECTED, "local_server"}


def test_the_shortest_example_is_short() -> None:
    """Two processes share KV in at most 40 lines."""
    text = (ROOT / "examples" / "store_and_retrieve.py").read_text()
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("name", kvcore.__all__)
def test_a_public_name_is_there(name: str) -> None:
    """Each name of the public API is found and documented."""
    found = getattr(kvcore, name)
    assert isinstance(found, str) or found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Names that are not public are not found."""
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvcore.no_such_name
