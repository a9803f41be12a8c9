"""Rolling hash: of every window of a token sequence, in a few array passes.

H(t) = sum of t[j] * base**-j modulo 2**64 over the window's tokens j. With prefix sums
S of t[i] * base**-i, the window at o has H = (S[o + window] - S[o]) * base**o, so all
windows cost a multiplication, a running sum, a difference and a multiplication. The
base is odd, hence invertible. A secret base makes accidental collisions rare; modulo
2**64, colliding windows can be constructed that collide for every base. Matches are
therefore confirmed by SHA-256: a forged collision costs a comparison, and never causes
a match.
"""

from __future__ import annotations

import secrets

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]

SLICE_WINDOWS = 16_384
"""Windows hashed at once: about 100 us, and arrays that stay in the CPU's cache."""


class RollingHash:
    """Hashes of windows of `window` tokens."""

    def __init__(self, window: int, base: int | None = None) -> None:
        self.window = window
        base = (secrets.randbits(64) if base is None else base) | 1
        size = SLICE_WINDOWS + window
        self._powers = _powers(base, size)
        self._inverses = _powers(pow(base, -1, 1 << 64), size)

    def windows(self, tokens: Tokens) -> Hashes:
        """Return the hash of the window at each token, `[tokens - window + 1]`.

        At most `SLICE_WINDOWS` windows.
        """
        num_windows = len(tokens) - self.window + 1
        sums = np.empty(len(tokens) + 1, np.uint64)
        sums[0] = 0
        scaled = tokens * self._inverses[: len(tokens)]
        np.cumsum(scaled, out=sums[1:])
        hashes: Hashes = sums[self.window :] - sums[:num_windows]
        hashes *= self._powers[:num_windows]
        return hashes

    def chunks(self, tokens: Tokens) -> Hashes:
        """Return the hashes of adjacent windows, `[tokens / window]`."""
        rows = tokens.reshape(-1, self.window)
        hashes: Hashes = (rows * self._inverses[: self.window]).sum(axis=1)
        return hashes


def _powers(base: int, size: int) -> Hashes:
    powers = np.full(size, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)
