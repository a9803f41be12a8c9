"""The Triton programs under Triton's interpreter, on this process's memory.

The interpreter is chosen when a program is declared, so the programs are loaded once
more here, under no name. Tiles may be smaller than on a device: more edges, less work.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from importlib.util import find_spec, module_from_spec
from typing import Any
from unittest.mock import patch

from kvcore.cuda.kernel_launches import (
    Arguments,
    RotateLaunch,
    RowCopy,
    move_arguments,
    turn_arguments,
    upload_arguments,
)
from kvcore.cuda.staging import FilledBuffer
from tests.cuda.fake_gpu import FakeStream


@cache
def programs() -> Any:
    """Load the programs for the interpreter."""
    spec = find_spec("kvcore.cuda.triton_kernels")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with patch.dict(os.environ, TRITON_INTERPRET="1"):
        spec.loader.exec_module(module)
    return module


def run(arguments: Arguments, **constants: int) -> None:
    """Run one launch to its end, with some constants of its own."""
    arguments = replace(arguments, constants={**arguments.constants, **constants})
    values = (*arguments.longs.values(), *arguments.ints.values())
    program = programs().KERNELS[arguments.program]
    grid = (int(arguments.constants["programs"]),)
    program[grid](*values, **arguments.constants)


class InterpretedKernels:
    """`Kernels` of the fake device that are the real programs."""

    def upload(self, stream: FakeStream, table: FilledBuffer) -> None:  # noqa: D102
        stream.call(lambda: run(upload_arguments(table), programs=1), [])

    def gather(self, stream: FakeStream, move: RowCopy) -> None:  # noqa: D102
        arguments = move_arguments(move, gather=True)
        stream.call(lambda: run(arguments, pieces=32, programs=1), [])

    def scatter(self, stream: FakeStream, move: RowCopy) -> None:  # noqa: D102
        arguments = move_arguments(move, gather=False)
        stream.call(lambda: run(arguments, pieces=32, programs=1), [])

    def turn(self, stream: FakeStream, turn: RotateLaunch) -> None:  # noqa: D102
        arguments = turn_arguments(turn)
        stream.call(lambda: run(arguments, heads=16, programs=1), [])
