"""What a device has to know to turn keys: where they lie and how far they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kvcore.blend.key_rotation import RAW_DTYPES, BlockRotation, rotation_factors
from kvcore.cuda.copy_plan import I64
from kvcore.cuda.kernel_launch import RotateLaunch
from kvcore.errors import LayoutError
from kvcore.layout import KVLayout
from kvcore.rope import Rope


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """The keys of one cache in token order, as one rotation sees them.

    `planes` are K's alone.
    """

    layout: KVLayout
    planes: I64
    rope: Rope

    @classmethod
    def of(cls, layout: KVLayout, planes: I64, rope: Rope) -> Self:
        """Take K's planes, which come first.

        Raises:
            LayoutError: keys that do not lie at multiples of an element's size.
        """
        item = RAW_DTYPES[layout.part.dtype].itemsize
        planes = planes[: layout.part.num_layers]
        places = (layout.block_stride, layout.slot_stride, *planes.tolist())
        if any(place % item for place in places):
            raise LayoutError(f"rope: keys do not lie at multiples of {item} bytes")
        return cls(layout, planes, rope)

    @property
    def factor_bytes(self) -> int:
        """Bytes of one turn's factors."""
        return self.rope.rotary_dim // 2 * 16

    def max_turns(self, table_bytes: int) -> int:
        """Return how many turns a table has room for, at least one."""
        return max((table_bytes - self.planes.nbytes - 16) // self.factor_bytes, 1)

    def arrays(self, turns: Sequence[BlockRotation]) -> list[np.ndarray[Any, Any]]:
        """Return a table: planes' addresses, then the factors of each turn."""
        by = [rotation_factors(self.rope, turn.distance) for turn in turns]
        return [self.planes, np.array(by, np.complex128)]

    def launches(
        self, turns: Sequence[BlockRotation], planes: int, factors: int
    ) -> list[RotateLaunch]:
        """Return the work, with the table's two arrays at these addresses."""
        layout, rope = self.layout, self.rope
        head_bytes = rope.head_dim * RAW_DTYPES[layout.part.dtype].itemsize
        return [
            RotateLaunch(
                rope=rope,
                dtype=layout.part.dtype,
                planes=planes,
                factors=factors + number * self.factor_bytes,
                num_planes=len(self.planes),
                first_block=turn.first_block,
                end_block=turn.end_block,
                block_slots=layout.block_size,
                block_stride=layout.block_stride,
                slot_stride=layout.slot_stride,
                num_heads=layout.part.unit_bytes // head_bytes,
            )
            for number, turn in enumerate(turns)
        ]
