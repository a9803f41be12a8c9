"""A cache layout as tables: its axes, parts, and the contiguous runs of a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.layout import CacheGroup, KVLayout
from kvctl.console import Table, size

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class LayoutTables:
    """Tables of the registered cache of one rank for a chunk size."""

    name: str
    groups: Sequence[CacheGroup]
    handle_bytes: Sequence[int]
    world_size: int
    chunk_size: int

    def build_tables(self) -> list[Table | str]:
        """Return tables and lines for `console.show`."""
        layouts = self.layouts()
        return [
            self._groups(),
            self._chunk_parts(layouts),
            self._runs(layouts),
            self._total(layouts),
        ]

    def layouts(self) -> list[KVLayout]:
        """Return the layout of each group.

        Raises:
            LayoutError: a layout cannot be derived.
        """
        return [
            KVLayout.derive(group, self.handle_bytes, self.chunk_size)
            for group in self.groups
        ]

    def _groups(self) -> Table:
        columns = ("group", "kind", "axes", "shape", "strides", "dtype")
        rows = tuple(
            (
                str(index),
                _attention(group),
                group.axes,
                _dims(group.tensors[0].shape),
                _dims(group.tensors[0].strides),
                group.dtype,
                str(len(group.tensors)),
                str(group.block_size),
            )
            for index, group in enumerate(self.groups)
        )
        title = f"{self.name}: registration of one rank"
        return Table(title, (*columns, ">tensors", ">block"), rows)

    def _chunk_parts(self, layouts: Sequence[KVLayout]) -> Table:
        columns = ("group", "order", "shape", "dtype", ">bytes", "fingerprint")
        rows = []
        for index, layout in enumerate(layouts):
            desc = layout.part.desc(self.chunk_size)
            shape, dtype = _dims(desc.shapes[0]), desc.dtypes[0]
            size_text, name = size(layout.part.num_bytes), layout.part.fingerprint
            rows.append((str(index), layout.part.order, shape, dtype, size_text, name))
        title = f"parts of a chunk of {self.chunk_size} tokens"
        return Table(title, columns, tuple(rows))

    def _runs(self, layouts: Sequence[KVLayout]) -> Table:
        columns = (
            "group",
            ">planes",
            ">run",
            ">runs per part",
            ">with adjacent blocks",
        )
        rows = []
        for index, layout in enumerate(layouts):
            runs = ContiguousRuns.of(layout)
            rows.append(
                (
                    str(index),
                    str(layout.part.num_planes),
                    size(runs.run_bytes),
                    str(runs.num_scattered),
                    str(runs.num_adjacent),
                )
            )
        return Table("contiguous runs of a copy", columns, tuple(rows))

    def _total(self, layouts: Sequence[KVLayout]) -> str:
        rank_bytes = sum(layout.part.num_bytes for layout in layouts)
        chunk_bytes = sum(
            part.num_bytes * (1 if part.replicated else self.world_size)
            for part in (layout.part for layout in layouts)
        )
        chunks = GIB // chunk_bytes
        return (
            f"bytes per chunk: {size(rank_bytes)} per rank, {size(chunk_bytes)} total "
            f"(world size {self.world_size}); chunks per GiB: {chunks:,}, "
            f"{chunks * self.chunk_size:,} tokens"
        )


@dataclass(frozen=True, slots=True)
class ContiguousRuns:
    """Contiguous runs of one part, with no adjacent blocks and with all adjacent."""

    run_bytes: int
    num_scattered: int
    num_adjacent: int

    @classmethod
    def of(cls, layout: KVLayout) -> ContiguousRuns:
        """Return the runs of a whole part."""
        part = layout.part
        blocks = part.chunk_size // layout.block_size
        units = layout.block_size // part.unit_tokens
        if units > 1 and layout.slot_stride != part.unit_bytes:
            num = part.num_planes * blocks * units
            return cls(part.unit_bytes, num, num)
        block_bytes = units * part.unit_bytes
        scattered = part.num_planes * blocks
        adjacent = layout.block_stride == block_bytes
        return cls(block_bytes, scattered, part.num_planes if adjacent else scattered)


def _attention(group: CacheGroup) -> str:
    words = ["opaque pages" if group.kind == "pages" else "tokens"]
    if group.window is not None:
        words.append(f"window {group.window}")
    if group.replicated:
        words.append("replicated")
    return ", ".join(words)


def _dims(values: Sequence[int]) -> str:
    return f"[{', '.join(map(str, values))}]"
