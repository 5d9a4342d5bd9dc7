"""The benchmark of dispatchers: its bounds are the published ones, and it runs."""

from __future__ import annotations

import pytest

from benchmarks.comm.__main__ import line_of, rows_of, run_ranks
from benchmarks.comm.bounds import expected_bytes
from benchmarks.comm.shape import BARE, COLLECTIVES, NAMES, Shape


def test_bounds_are_those_of_uniform_routing() -> None:
    """2.11 copies a token of 32 experts, top-4, on 4 ranks, where per_expert has 3."""
    shape = Shape(hidden_size=500)
    per_expert, dedup = (expected_bytes(name, shape, 4) for name in ("per_expert", "dedup"))
    assert per_expert == 2 * 3 * 1000
    assert dedup is not None
    assert (dedup - 3 * 1000) / (1000 + 8) == pytest.approx(2.11, abs=0.005)
    assert expected_bytes("static", shape, 4) is None


def test_two_ranks_run_and_count() -> None:
    found = run_ranks(2, tokens=40, rounds=1)
    for one in found:
        assert set(one) == {*NAMES, BARE}
        for name, calls in COLLECTIVES.items():
            assert one[name]["collectives"] == calls
            assert one[name]["bytes"] > 0
        assert one["auto"]["chosen"] == found[0]["auto"]["chosen"]
    for name in COLLECTIVES:
        sent, needed = (sum(one[name][what] for one in found) for what in ("bytes", "needed"))
        assert sent == pytest.approx(needed, rel=0.02)  # counts travel too
        assert sent >= needed
        expected = expected_bytes(name, Shape(), 2)
        assert expected is None or sent / 2 == pytest.approx(expected, rel=0.15)
    for name in (*NAMES, BARE):
        assert len(rows_of("case", name, found)) == 3
        assert name in line_of(name, found, Shape())
