"""What auto expects of sizes that it did not time."""

from __future__ import annotations

import pytest

from moe_serve.comm.auto import _SIZES, seconds_at


def test_times_lie_on_lines_between_the_sizes_and_go_on() -> None:
    times_s = [1.0, 8.0, 8.0, 200.0]  # at 1, 8, 64 and 256 tokens
    assert _SIZES == (1, 8, 64, 256)
    assert [seconds_at(size, times_s) for size in _SIZES] == times_s
    assert seconds_at(4, times_s) == pytest.approx(4.0)
    assert seconds_at(30, times_s) == pytest.approx(8.0)
    assert seconds_at(65, times_s) == pytest.approx(9.0)
    assert seconds_at(512, times_s) == pytest.approx(456.0)
    assert seconds_at(0, times_s) == pytest.approx(0.0)


def test_more_tokens_are_never_expected_to_take_less() -> None:
    assert seconds_at(500, [1.0, 3.0, 2.0, 1.5]) == pytest.approx(2.0)
