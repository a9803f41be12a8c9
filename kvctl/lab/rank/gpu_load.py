"""Compute load on a GPU during copies: consecutive matrix products.

They run in the worker's process, as a model does, and keep the device always busy.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from time import perf_counter, sleep
from types import TracebackType
from typing import Self

import numpy as np
import torch

SIZES = {"cuda": 4096, "cpu": 128}
"""Sizes of the square matrices: 137 GFLOP, about 0.2 ms on an H100."""
IN_FLIGHT = 4
ALONE_S = 1.0


class MatrixProducts:
    """Multiplies matrices in a thread while the context is active."""

    def __init__(self, device: str) -> None:
        torch_device = torch.device(device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        size = SIZES[device]
        self._a, self._b = torch.rand(2, size, size, device=torch_device, dtype=dtype)
        # The first product loads the kernel, which no rate should include.
        self._product = self._a @ self._b
        if device == "cuda":
            torch.cuda.synchronize()
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._ended: list[float] = []
        """End of each product, on `perf_counter`."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="products")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def rate(self, seconds: float = ALONE_S) -> float:
        """Return products per second without calls, measured for `seconds`."""
        begun = perf_counter()
        sleep(seconds)
        return self.rate_in([(begun, perf_counter())])

    def rate_in(self, spans: Sequence[tuple[float, float]]) -> float:
        """Return products per second during these spans of `perf_counter`."""
        ended = np.array(self._ended)
        counted = [np.searchsorted(ended, span) for span in spans]
        total_s = sum(end - begun for begun, end in spans)
        return float(sum(last - first for first, last in counted)) / total_s

    def _run(self) -> None:
        if self._stream is None:
            while not self._stop.is_set():
                torch.mm(self._a, self._b, out=self._product)
                self._ended.append(perf_counter())
            return
        in_flight: deque[torch.cuda.Event] = deque()
        with torch.cuda.stream(self._stream):
            while not self._stop.is_set():
                torch.mm(self._a, self._b, out=self._product)
                event = torch.cuda.Event(blocking=True)
                event.record(self._stream)
                in_flight.append(event)
                if len(in_flight) > IN_FLIGHT:
                    in_flight.popleft().synchronize()
                    self._ended.append(perf_counter())
        self._stream.synchronize()
