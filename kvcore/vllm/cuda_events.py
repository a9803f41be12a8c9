"""How far a GPU has come with the engine's work, told to the server.

Imported only where a cache lies on a GPU, and beside a torch that has CUDA.
"""

from __future__ import annotations

from itertools import cycle

import torch

NUM_EVENTS = 64
"""Used in turn. A server knows at most 256 of a worker's; one that is recorded again
while a copy waits for it only makes the copy wait for more."""


class CudaEvents:
    """Shared events of the current device. Used by one thread."""

    def __init__(self) -> None:
        made = [torch.cuda.Event(interprocess=True) for _ in range(NUM_EVENTS)]
        self._next = cycle([(event, bytes(event.ipc_handle())) for event in made])

    def mark(self) -> bytes:
        """Record an event behind all work of the current stream; return its handle."""
        event, handle = next(self._next)
        event.record()
        return handle
