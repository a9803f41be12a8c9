"""Imports inside the laboratory go to lower layers only, and have no cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

LAB = Path(__file__).resolve().parents[2] / "kvctl" / "lab"

LAYERS = (
    ("regression", "runner"),
    ("page",),
    ("report",),
    ("compare",),
    ("results",),
    ("vllm",),
    ("run",),
    ("engine",),
    ("rank",),
    ("systems",),
    ("workload",),
    ("traces",),
    ("process_messages", "run_turns"),
    ("config",),
    ("ceilings",),
    ("latency",),
)
"""Packages and modules of `kvctl.lab`, highest first."""


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text())


def lab_imports(path: Path) -> Iterator[str]:
    """Yield the modules of the lab that a file imports, at any depth."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.startswith("kvctl.lab."))


def layer_of(module: str) -> int:
    """Return the index of a module's layer; 0 is the highest."""
    part = module.removeprefix("kvctl.lab.").split(".")[0]
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


def modules() -> dict[str, Path]:
    """Return the files of the lab by module name."""
    return {
        ".".join(("kvctl.lab", *path.relative_to(LAB).with_suffix("").parts)): path
        for path in sorted(LAB.rglob("*.py"))
        if path.name != "__init__.py"
    }


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_lower_layers(module: str) -> None:
    """A module imports its own layer and lower ones."""
    for imported in lab_imports(modules()[module]):
        assert layer_of(imported) >= layer_of(module), f"{module}: {imported}"


def test_imports_have_no_cycles() -> None:
    """Includes imports under `TYPE_CHECKING` and inside functions."""
    known = modules()
    graph = {
        module: {name for name in lab_imports(path) if name in known} - {module}
        for module, path in known.items()
    }
    order = list(TopologicalSorter(graph).static_order())  # Raises CycleError.
    assert set(order) == set(known)


def test_names_of_files_and_classes_are_unique() -> None:
    """A name has one meaning in all of kvctl."""
    files: list[str] = []
    classes: list[str] = []
    for path in LAB.parent.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            files.append(path.name)
        nodes = ast.walk(parse(path))
        classes += [n.name for n in nodes if isinstance(n, ast.ClassDef)]
    assert not {name for name in files if files.count(name) > 1}
    assert not {name for name in classes if classes.count(name) > 1}
