"""Every token's experts are told once, in order, whatever is computed again."""

from __future__ import annotations

import numpy as np
import pytest

from moe_serve.engine.routing_log import Array, RoutingLog
from moe_serve.types import RoutedExperts


def rows(first: int, count: int) -> Array:
    """Return ids of tokens from `first` on, which tell their place."""
    return np.arange(first * 6, (first + count) * 6, dtype=np.int16).reshape(count, 3, 2)


def told(routed: RoutedExperts | None) -> tuple[int, list[int]]:
    assert routed is not None
    array = routed.array()
    assert (array.dtype, array.shape[1:]) == (np.int16, (3, 2))
    return routed.first, array[:, 0, 0].tolist()


def test_tokens_are_told_once_and_in_order() -> None:
    log = RoutingLog()
    assert told(log.new(0, rows(0, 3))) == (0, [0, 6, 12])
    assert told(log.new(3, rows(3, 2))) == (3, [18, 24])
    assert log.num_tokens == 5


def test_what_is_computed_again_is_not_told_again() -> None:
    log = RoutingLog()
    log.new(0, rows(0, 4))
    assert log.new(0, rows(0, 2)) is None  # after a preemption, in other chunks
    assert log.num_tokens == 4
    assert told(log.new(2, rows(2, 4))) == (4, [24, 30])


def test_a_gap_is_a_fault() -> None:
    log = RoutingLog()
    with pytest.raises(AssertionError):
        log.new(1, rows(1, 1))
