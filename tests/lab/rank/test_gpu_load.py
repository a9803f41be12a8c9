"""Matrix products during copies, which measure how much copies slow down a model."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.torch


def test_products_are_counted_in_the_spans_only() -> None:
    """Each product counts once, in the span in which it ends."""
    from kvctl.lab.rank.gpu_load import MatrixProducts

    with MatrixProducts("cpu") as products:
        while len(products._ended) < 100:
            products.rate(0.001)
    first, last = products._ended[0], products._ended[-1]
    middle = products._ended[len(products._ended) // 2]
    assert products.rate_in([(first - 1, first)]) == 0
    halves = products.rate_in([(first, middle), (middle, last)])
    assert halves == pytest.approx((len(products._ended) - 1) / (last - first))
