"""The benchmark of dispatchers: its bounds are the published ones, and it runs."""

from __future__ import annotations

import pytest

from benchmarks.comm.__main__ import least_bytes, run_ranks
from benchmarks.comm.shape import COLLECTIVES, NAMES, Shape


def test_bounds_are_those_of_uniform_routing() -> None:
    """2.11 copies a token of 32 experts, top-4, on 4 ranks, where per_expert has 3."""
    shape = Shape(hidden_size=500)
    per_expert, dedup = (least_bytes(name, shape, 4) for name in ("per_expert", "dedup"))
    assert per_expert == 2 * 3 * 1000
    assert dedup is not None
    assert (dedup - 3 * 1000) / (1000 + 8) == pytest.approx(2.11, abs=0.005)
    assert least_bytes("static", shape, 4) is None


def test_two_ranks_run_and_count() -> None:
    found = run_ranks(2, tokens=40, rounds=1)
    for one in found:
        assert set(one) == set(NAMES)
        for name, calls in COLLECTIVES.items():
            assert one[name]["collectives"] == calls
            assert one[name]["bytes"] > 0
        assert one["auto"]["chosen"] == found[0]["auto"]["chosen"]
    mean = sum(one["per_expert"]["bytes"] for one in found) / 2
    assert mean == pytest.approx(least_bytes("per_expert", Shape(), 2), rel=0.15)
