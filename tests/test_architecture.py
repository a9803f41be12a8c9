"""Imports between packages follow the layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CORE = (
    (
        "kvcore",
        "kvcore.errors",
        "kvcore.option_structs",
        "kvcore.config",
        "kvcore.keys",
        "kvcore.rope",
        "kvcore.layout",
        "kvcore.extents",
        "kvcore.status",
        "kvcore.protocol",
        "kvcore.wire",
        "kvcore.process",
        "kvcore.private_file",
        "kvcore.shm",
    ),
    ("kvcore.copy",),
    ("kvcore.storage",),
    ("kvcore.engine",),
    ("kvcore.extensions",),
    ("kvcore.server", "kvcore.client"),
)
"""Packages of the core, lowest first. A module imports its own layer and lower ones."""

OPTIONAL = (
    "kvcore.worker",
    "kvcore.tiers",
    "kvcore.cuda",
    "kvcore.blend",
    "kvcore.vllm",
)
"""Parts that depend on the core, never the reverse; they register by name."""

FLOORS = (*CORE, OPTIONAL, ("kvctl",))

SERVER_SIDE = (
    "kvcore.server",
    "kvcore.engine",
    "kvcore.storage",
    "kvcore.tiers",
    "kvcore.blend.blend_engine",
    "kvcore.worker.ticket_service",
)

NEVER = {
    "kvcore.client": SERVER_SIDE,
    "kvcore.vllm": SERVER_SIDE,
    "kvcore.server": ("kvcore.client",),
    "kvctl.lab": (*SERVER_SIDE, "kvctl.commands"),
    "kvctl.console": ("kvctl.lab", "kvctl.commands", "kvctl.views"),
    "kvctl.views": ("kvctl.commands", "kvcore.server", "kvcore.engine"),
}
"""Lower packages that a package must not import."""

EXCEPT = {"kvctl.lab.workload.cache_simulation": ("kvcore.storage.eviction",)}
"""Exceptions: the simulation runs the server's own policies."""

TORCH = (
    "kvcore.vllm",
    "kvctl.lab.rank.gpu_load",
    "kvctl.lab.rank.gpu_cache",
    "kvctl.lab.systems.lmcache_process",
)
PRINTS = ("kvctl.console",)


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name and where it is imported."""

    importer: str
    imported: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path) -> str:
    """Return the dotted name of a file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def trees() -> tuple[tuple[str, ast.Module], ...]:
    """Return the imports of all modules of the two packages."""
    return tuple(
        (module_name(path), ast.parse(path.read_text()))
        for package in ("kvcore", "kvctl")
        for path in sorted((ROOT / package).rglob("*.py"))
    )


def imports() -> Iterator[Import]:
    """List imports at any depth; `from a import b` counts as a and as a.b.

    Not those of `kvcore` itself, which only names the public API and imports it lazily.
    """
    for name, tree in trees():
        if name == "kvcore":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(name, alias.name, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}:{node.lineno} imports relatively"
                yield Import(name, str(node.module), node.lineno)
                for alias in node.names:
                    yield Import(name, f"{node.module}.{alias.name}", node.lineno)


def within(name: str, *packages: str) -> bool:
    """Return whether a module is one of the packages or inside one."""
    return any(name == one or name.startswith(f"{one}.") for one in packages)


def floor_of(name: str) -> int | None:
    """Return a module's layer, by the longest matching name."""
    fitting = [
        (len(package), floor)
        for floor, packages in enumerate(FLOORS)
        for package in packages
        if package == name or (package != "kvcore" and within(name, package))
    ]
    return max(fitting)[1] if fitting else None


def is_module(name: str) -> bool:
    """Return whether a dotted name is one of the modules, not a name in one."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def test_every_module_has_a_floor() -> None:
    """The table of layers lists all packages."""
    assert [name for name, _ in trees() if floor_of(name) is None] == []


def test_imports_go_down_only() -> None:
    """No module imports from a higher layer."""
    upwards = [
        str(one)
        for one in imports()
        if within(one.imported, "kvcore", "kvctl") and is_module(one.imported)
        if (floor_of(one.imported) or 0) > (floor_of(one.importer) or 0)
    ]
    assert upwards == []


@pytest.mark.parametrize("package", NEVER)
def test_neighbours_stay_apart(package: str) -> None:
    """Clients and workers import the protocol, not the server."""
    forbidden = [
        str(one)
        for one in imports()
        if within(one.importer, package) and within(one.imported, *NEVER[package])
        if not within(one.imported, *EXCEPT.get(one.importer, ()))
    ]
    assert forbidden == []


def test_torch_stays_where_it_is_needed() -> None:
    """Only CUDA and vLLM modules import torch."""
    strays = [
        str(one)
        for one in imports()
        if within(one.imported, "torch") and not within(one.importer, *TORCH)
    ]
    assert strays == []


def test_only_the_console_prints() -> None:
    """All other modules print through `kvctl.console`."""
    strays = [
        f"{name}:{node.lineno}"
        for name, tree in trees()
        if not within(name, *PRINTS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert strays == []


def test_nothing_is_unpickled() -> None:
    """No module imports pickle or another decoder that runs code."""
    strays = [
        str(one)
        for one in imports()
        if within(one.imported, "pickle", "marshal", "shelve", "cloudpickle")
    ]
    assert strays == []
