"""`DeviceCaches` of a fake device, whose memory is this host's: host caches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcore.copy.host_cache import HostCache
from kvcore.cuda.device_interface import Device
from kvcore.layout import KVLayout
from kvcore.status import DeviceStatus
from tests.cuda.cuda_fixture import published
from tests.cuda.fake_gpu import array_at


class HostCaches:
    """`DeviceCaches` whose copies run at once; counts the open caches."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.num_open = 0
        self.is_closed = False

    def cache(self, layout: KVLayout, addresses: Sequence[int]) -> HostCache:
        """Return a new cache in the fake device's memory."""
        self.num_open += 1
        end = int(layout.plane_offsets.max()) + layout.num_blocks * layout.block_stride
        arrays = [array_at(address, end) for address in addresses]
        return _Counted(self, layout, arrays)

    def status(self) -> DeviceStatus:
        """Return its status, with rates that were not measured."""
        name = self.device.name
        return DeviceStatus(self.device.uuid, name, self.num_open, 0, {}, published())

    def close(self) -> None:
        """Record that it was closed."""
        self.is_closed = True


class _Counted(HostCache):
    def __init__(
        self, owner: HostCaches, layout: KVLayout, arrays: Sequence[np.ndarray]
    ) -> None:
        super().__init__(layout, arrays)
        self._owner = owner

    def close(self) -> None:
        self._owner.num_open -= 1
