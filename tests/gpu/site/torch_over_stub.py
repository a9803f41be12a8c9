"""A GPU for torch where the driver is the stub: tensors "on cuda" lie in its memory.

Torch's own runtime cannot work over the stub. What our code asks of `torch.cuda` is
answered here instead, by our own device; tensors are ordinary ones of the host whose
storage was taken from the stub, so that they have handles. As from torch's allocator,
each begins somewhere inside an allocation.
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
"""Where in its allocation a tensor begins."""
MAKERS = ("empty", "full", "ones", "rand", "randn", "zeros")


@cache
def devices() -> Any:
    """Return ours."""
    from kvcore.cuda.driver import open_devices

    return open_devices()


@cache
def the_stream() -> Any:
    """Return one that stands for all of torch's."""
    return devices()[0].stream()


class Event:
    """What is used of `torch.cuda.Event`; work is done when it is queued."""

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
    """Wrap a function that makes tensors."""

    @wraps(make)
    def made(*args: Any, device: Any = None, **options: Any) -> Any:
        where = torch.device(device if device is not None else "cpu")
        plain = make(*args, **options)
        return placed(torch, plain, where.index or 0) if where.type == "cuda" else plain

    return made


def placed(torch: ModuleType, plain: Any, number: int) -> Any:
    """Copy a tensor to a device's memory, which goes with the last view of it."""
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
    large = 1024  # The product of an engine's own, which takes a host minutes.
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
    """Loads torch as ever, and gives it a GPU."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As ever."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As ever, and then some."""
        self._loader.exec_module(module)
        patch(module)


class Finder(PathFinder):
    """Finds torch, and nothing else."""

    @classmethod
    def find_spec(cls, name: str, *rest: Any) -> ModuleSpec | None:
        """Find it where it is."""
        spec = super().find_spec(name, *rest) if name == "torch" else None
        if spec is not None and spec.loader is not None:
            spec.loader = Patching(spec.loader)
        return spec


sys.meta_path.insert(0, Finder)
