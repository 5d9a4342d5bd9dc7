"""Slots of what was seen last, and the last tokens of a step's sequences."""

from __future__ import annotations

import numpy as np
import pytest

from moe_serve.predictors._sequences import Slots, last_rows, sigmoid, uses


def test_the_slot_seen_longest_ago_is_taken() -> None:
    slots = Slots(capacity=2)
    assert [slots.take(name) for name in (7, 8, 7)] == [(0, True), (1, True), (0, False)]
    assert slots.take(9) == (1, True)
    assert slots.find(8) is None
    assert slots.find(7) == 0
    assert len(slots) == 2


@pytest.mark.parametrize(
    ("names", "rows"), [([5], [0]), ([1, 1, 1], [2]), ([1, 2, 3], [0, 1, 2]), ([4, 4, 9], [1, 2])]
)
def test_last_rows(names: list[int], rows: list[int]) -> None:
    assert last_rows(np.array(names)).tolist() == rows


def test_uses() -> None:
    assert uses(np.array([[0, 2], [1, 0]]), 3).tolist() == [[1, 0, 1], [1, 1, 0]]


def test_sigmoid_does_not_overflow() -> None:
    values = sigmoid(np.array([-1000.0, 0.0, 1000.0], np.float32))
    assert values.dtype == np.float32
    assert values == pytest.approx([0, 0.5, 1])
