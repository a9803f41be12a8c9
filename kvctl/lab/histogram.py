"""How often which duration was measured, to eleven bits of it.

So much is kept as by an HDR histogram of three digits, and such a one is what goes to
a file: any tool that knows the format reads it, and histograms add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

DIGITS = 3
BITS = 11
"""Of a duration in nanoseconds that are kept: 3 digits."""
MAX_NS = 24 * 3600 * 10**9

Ints = npt.NDArray[np.int64]


class Histogram(msgspec.Struct, frozen=True):
    """Durations of one operation. Mean and maximum are exact; they add up."""

    values: bytes = b""
    """Packed int64 nanoseconds, ascending, each once."""
    counts: bytes = b""
    """Packed int64, one a value."""
    total_s: float = 0.0
    max_s: float = 0.0

    @classmethod
    def of(cls, seconds: npt.NDArray[np.float64]) -> Histogram:
        """Count durations, in any order."""
        if not seconds.size:
            return cls()
        exact = np.clip(np.rint(seconds * 1e9), 1, MAX_NS).astype(np.int64)
        # One bit of the mantissa stands before the point.
        shift = np.maximum(np.frexp(exact.astype(np.float64))[1] - BITS, 0)
        values, counts = np.unique((exact >> shift) << shift, return_counts=True)
        return cls(
            values.tobytes(),
            counts.astype(np.int64).tobytes(),
            float(seconds.sum()),
            float(seconds.max()),
        )

    @classmethod
    def merge(cls, many: Iterable[Histogram]) -> Histogram:
        """Put histograms of several processes, or times, together."""
        parts = [part for part in many if part.values]
        if len(parts) < 2:
            return parts[0] if parts else cls()
        values, place = np.unique(
            np.concatenate([part.values_ns for part in parts]), return_inverse=True
        )
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, place, np.concatenate([part.count_each for part in parts]))
        return cls(
            values.tobytes(),
            counts.tobytes(),
            sum(part.total_s for part in parts),
            max(part.max_s for part in parts),
        )

    @property
    def values_ns(self) -> Ints:
        """The durations that occurred, ascending."""
        return np.frombuffer(self.values, np.int64)

    @property
    def count_each(self) -> Ints:
        """How often each of them did."""
        return np.frombuffer(self.counts, np.int64)

    @property
    def count(self) -> int:
        """All durations."""
        return int(self.count_each.sum())

    def quantiles_s(self, shares: Sequence[float]) -> list[float]:
        """Return for each share the smallest duration that so many are not above.

        Nearest rank: it never lies between two modes. At least one was counted.
        """
        upto = np.cumsum(self.count_each)
        ranks = np.ceil(np.asarray(shares) * upto[-1])
        values = self.values_ns[np.searchsorted(upto, ranks)]
        return [min(value / 1e9, self.max_s) for value in values.tolist()]

    def encode(self) -> str:
        """Write it as HdrHistogram's V2 format, compressed, in base64.

        Values are nanoseconds; see github.com/HdrHistogram/HdrHistogram.
        """
        from hdrh.histogram import HdrHistogram

        encoded = HdrHistogram(1, MAX_NS, DIGITS)
        for value, count in zip(
            self.values_ns.tolist(), self.count_each.tolist(), strict=True
        ):
            encoded.record_value(value, count)
        return bytes(encoded.encode()).decode()


def decode(text: str) -> Histogram:
    """Read what `Histogram.encode` or another HDR histogram of nanoseconds wrote.

    Mean and maximum are then as exact as the buckets.
    """
    from hdrh.histogram import HdrHistogram

    read = HdrHistogram.decode(text.encode())
    counts = np.ctypeslib.as_array(read.counts).astype(np.int64)
    (at,) = counts.nonzero()
    values = np.array([read.get_value_from_index(i) for i in at.tolist()], np.int64)
    found = counts[at]
    return Histogram(
        values.tobytes(),
        found.tobytes(),
        float((values * found).sum() / 1e9),
        read.get_max_value() / 1e9,
    )
