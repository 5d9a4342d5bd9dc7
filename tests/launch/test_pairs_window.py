"""How evenly ranks were busy is told of the latest steps."""

from __future__ import annotations

import pytest

from moe_serve.launch.pairs_window import PairsWindow


def test_nothing_computed_is_no_imbalance() -> None:
    window = PairsWindow(2)
    assert window.imbalance() is None
    window.told([0, 0])
    assert window.imbalance() is None


def test_the_busiest_is_told_over_the_mean() -> None:
    window = PairsWindow(4)
    window.told([10, 10, 10, 10])
    assert window.imbalance() == 1.0
    window.told([10, 10, 10, 50])
    assert window.imbalance() == pytest.approx(2.5)


def test_what_was_long_ago_is_forgotten() -> None:
    window = PairsWindow(2)
    pairs = [0, 0]
    for _ in range(1000):
        pairs = [pairs[0] + 3, pairs[1] + 1]
        window.told(pairs)
    assert window.imbalance() == 1.5
    for _ in range(1099):
        pairs = [pairs[0] + 2, pairs[1] + 2]
        window.told(pairs)
    assert window.imbalance() == 1.0
