from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.cases import Case
from benchmarks.gpu.kernels import Taken, goal_of, measured
from benchmarks.gpu.limits import Limits
from benchmarks.gpu.setting import Setting


def case(**changes: object) -> Case:
    values = {
        "kernel": "linear",
        "name": "head",
        "num_rows": 1,
        "work": lambda _: None,
        "num_bytes": 1e8,
        "flop": 1e8,
    }
    return Case(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "is_memory_bound", "want"),
    [
        ({}, True, 0.8),
        ({"num_bytes": 6e7}, True, None),
        ({"kernel": "moe", "num_rows": 4096}, False, 0.6),
        ({"kernel": "moe", "num_rows": 512}, False, None),
        ({"kernel": "attention", "num_rows": 8192}, False, None),
    ],
)
def test_goals(changes: dict[str, object], is_memory_bound: bool, want: float | None) -> None:
    assert goal_of(case(**changes), is_memory_bound) == want


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    found = Setting(
        device=torch.device("cpu"),
        kernels="reference",
        is_dry=True,
        traces=(),
        scratch=tmp_path,
        seconds=60.0,
    )
    found.__dict__["clock"] = FixedClock()
    return found


class FixedClock:
    """A call takes 1 ms, then 2 ms, and so on."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def samples(
        self, work: object, repeats: int, *, is_cold: bool = False, calls: int = 1
    ) -> list[float]:
        assert is_cold, "inputs would be found in the cache"
        self._next_s += 1e-3
        return [self._next_s]

    def wait(self) -> None: ...


def test_fast_has_the_goals_and_exact_is_beside_it(setting: Setting) -> None:
    limits = Limits(setting)
    limits.__dict__ |= {"read_gb_s": 200.0, "copy_gb_s": 100.0, "matrix_tflop_s": 1.0}
    fast: Taken = {}
    found = list(measured(setting, limits, case(), "fast", ("linear", 0), fast))
    assert found[0].row.ratio == pytest.approx(1e8 / 1e-3 / 200e9)
    assert found[0].goal == 0.8
    found = list(measured(setting, limits, case(), "exact", ("linear", 0), fast))
    assert found[0].goal is None
    assert found[2].row.ratio == pytest.approx(2.0)
    assert (found[2].goal, found[2].is_most, found[2].is_met) == (1.3, True, False)


def test_what_writes_is_beside_a_copy_and_products_beside_the_matrix_rate(
    setting: Setting,
) -> None:
    limits = Limits(setting)
    limits.__dict__ |= {"read_gb_s": 200.0, "copy_gb_s": 100.0, "matrix_tflop_s": 1.0}
    row = next(measured(setting, limits, case(writes=True), "a", ("a", 0), {})).row
    assert (row.unit, row.limit) == ("GB/s", 100.0)
    row = next(measured(setting, limits, case(flop=1e12), "a", ("a", 0), {})).row
    assert (row.unit, row.limit) == ("TFLOP/s", 1.0)
    assert row.value == pytest.approx(500.0)
