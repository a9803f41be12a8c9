"""The Triton programs under Triton's interpreter, on this process's memory.

Triton selects the interpreter when a program is declared, so the module of the programs
is executed a second time here, outside `sys.modules`. Tiles may be smaller than on a
device: more edges, less work.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from importlib.util import find_spec, module_from_spec
from typing import Any
from unittest.mock import patch

from kvcore.cuda.kernel_launches import Arguments, KernelTask, arguments_of
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
    """`Kernels` of the fake device that run the real programs."""

    def launch(self, stream: FakeStream, task: KernelTask) -> None:
        """Queue a task, with fewer pieces or heads at a time than on a device."""
        arguments = arguments_of(task)
        tile = {"copy_rows": {"pieces": 32}, "rotate_keys": {"heads": 16}}
        constants = tile.get(arguments.program, {}) | {"programs": 1}
        stream.call(lambda: run(arguments, **constants), [])
