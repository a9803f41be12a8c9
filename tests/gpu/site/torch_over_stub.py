"""A GPU for torch over the stub of the driver: tensors "on cuda" are in its memory.

Torch's own runtime cannot work over the stub. The functions of `torch.cuda` that kvcore
uses are replaced by kvcore's own device. Tensors are host tensors whose storage was
allocated by the stub, so that they have handles. As with torch's allocator, each begins
inside an allocation.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from contextlib import nullcontext
from functools import cache, wraps
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

INSIDE = 512
"""Offset of a tensor in its allocation."""
MAKERS = ("empty", "full", "ones", "rand", "randn", "zeros")


@cache
def devices() -> Any:
    """Return kvcore's devices."""
    from kvcore.cuda.driver import open_devices

    return open_devices()


@cache
def the_stream() -> Any:
    """Return the stream that stands for all of torch's streams."""
    return devices()[0].stream()


class Event:
    """The used part of `torch.cuda.Event`; work is done when it is queued."""

    def __init__(self, *, interprocess: bool = False, blocking: bool = False) -> None:
        del blocking
        self._event = devices()[0].event(shared=interprocess)
        weakref.finalize(self, self._event.close).atexit = False

    def record(self, stream: object = None) -> None:  # noqa: D102
        del stream
        the_stream().record(self._event)

    def query(self) -> bool:  # noqa: D102
        return bool(self._event.is_done())

    def synchronize(self) -> None:  # noqa: D102
        self._event.wait()

    def ipc_handle(self) -> bytes:  # noqa: D102
        return bytes(self._event.handle())


def on_device(torch: ModuleType, make: Any) -> Any:
    """Return a wrapped tensor constructor that supports `device="cuda"`."""

    @wraps(make)
    def made(*args: Any, device: Any = None, **options: Any) -> Any:
        where = torch.device(device if device is not None else "cpu")
        plain = make(*args, **options)
        return placed(torch, plain, where.index or 0) if where.type == "cuda" else plain

    return made


def placed(torch: ModuleType, plain: Any, number: int) -> Any:
    """Return a copy in a device's memory, which is freed with its last view."""
    size = max(plain.nbytes, 1)
    device = devices()[number]
    address = device.allocate(INSIDE + size)
    buffer = (ctypes.c_uint8 * size).from_address(address + INSIDE)
    weakref.finalize(buffer, device.free, address).atexit = False
    flat = torch.frombuffer(buffer, dtype=torch.uint8)[: plain.nbytes]
    there = flat.view(plain.dtype).view(plain.shape)
    return there.copy_(plain)


def patch(torch: ModuleType) -> None:
    """Give torch a GPU."""
    for name in MAKERS:
        setattr(torch, name, on_device(torch, getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self: self
    product = torch.mm
    large = 1024  # Skip the large products of simulated engines: minutes on a CPU.
    torch.mm = lambda a, b, out: out if len(a) > large else product(a, b, out=out)
    torch.Tensor.__matmul__ = lambda a, b: a if len(a) > large else torch.matmul(a, b)
    torch.cuda.Event = Event
    torch.cuda.Stream = lambda _=None: SimpleNamespace(synchronize=lambda: None)
    torch.cuda.stream = lambda _: nullcontext()
    for name in ("synchronize", "set_device", "_sleep"):
        setattr(torch.cuda, name, lambda _=None: None)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: len(devices())
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda: (1 << 34, 1 << 34)
    torch.cuda.get_device_properties = lambda number: SimpleNamespace(
        name=devices()[number].name, total_memory=1 << 34, multi_processor_count=132
    )


class Patching(Loader):
    """Loads torch, and then patches it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return the original loader's module."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then patch it."""
        self._loader.exec_module(module)
        patch(module)


class Finder(PathFinder):
    """Finds torch only."""

    @classmethod
    def find_spec(cls, name: str, *rest: Any) -> ModuleSpec | None:
        """Return the spec of torch with a patching loader."""
        spec = super().find_spec(name, *rest) if name == "torch" else None
        if spec is not None and spec.loader is not None:
            spec.loader = Patching(spec.loader)
        return spec


sys.meta_path.insert(0, Finder)
