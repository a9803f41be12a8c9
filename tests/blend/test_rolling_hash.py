"""Rolling hashes of all windows of a token sequence."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvcore.blend.rolling_hash import RollingHash

WORD = 1 << 64


def plain(window: list[int], base: int) -> int:
    """Hash one window by the formula of the module's docstring."""
    inverse = pow(base, -1, WORD)
    return sum(token * pow(inverse, j, WORD) for j, token in enumerate(window)) % WORD


tokens_of = st.lists(st.integers(0, (1 << 32) - 1), min_size=5, max_size=40)


@given(tokens=tokens_of, base=st.integers(0, WORD - 1))
def test_every_window_has_the_sum_of_its_tokens(tokens: list[int], base: int) -> None:
    """Prefix sums give the same hashes as separate windows."""
    rolling = RollingHash(5, base)
    array = np.array(tokens, np.uint32)
    expected = [plain(tokens[at : at + 5], base | 1) for at in range(len(tokens) - 4)]
    assert rolling.windows(array).tolist() == expected
    whole = len(tokens) - len(tokens) % 5
    assert rolling.chunks(array[:whole]).tolist() == expected[:whole:5]


def test_two_hashes_have_bases_of_their_own() -> None:
    """Each server has a secret base, so no client can construct a collision."""
    tokens = np.arange(1, 9, dtype=np.uint32)
    made = {int(RollingHash(8).windows(tokens)[0]) for _ in range(5)}
    assert len(made) == 5
