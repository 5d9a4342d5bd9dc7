"""Sharing a batch's load among replicas, against all that could be done on small cases."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moe_serve.experts.placement.base import Array
from moe_serve.study.balance import fill_up, imbalance, split_evenly


def least_maximum(holds: Array, counts: Array) -> float:
    """Return the least highest load of any way to share: by subsets of ranks, as Hall's theorem.

    What only the ranks of a subset hold must be done by them; the worst subset is the bound, and
    with load that can be divided it is reached.
    """
    num_ranks = holds.shape[1]
    worst = 0.0
    for size in range(1, num_ranks + 1):
        for subset in combinations(range(num_ranks), size):
            outside = np.delete(holds, subset, axis=1).any(axis=1)
            worst = max(worst, float(counts[~outside].sum()) / size)
    return worst


def random_case(seed: int, num_replicated: int) -> tuple[Array, Array]:
    """Return 10 experts on 5 ranks, two each, of which some have replicas, and rows of each."""
    rng = np.random.default_rng(seed)
    holds = np.zeros((10, 5), bool)
    holds[np.arange(10), rng.permutation(10) % 5] = True
    for expert in range(num_replicated):
        holds[expert, rng.choice(5, size=int(rng.integers(1, 5)), replace=False)] = True
    return holds, rng.integers(0, 200, size=10).astype(float)


@pytest.mark.parametrize("seed", range(40))
def test_filling_up_is_best_for_one_expert(seed: int) -> None:
    holds, counts = random_case(seed, num_replicated=1)
    assert fill_up(holds, counts).max() == pytest.approx(least_maximum(holds, counts))


def test_filling_up_is_near_the_best_for_several() -> None:
    filled, even = [], []
    for seed in range(60):
        holds, counts = random_case(seed, num_replicated=4)
        best = least_maximum(holds, counts)
        loads = fill_up(holds, counts)
        assert loads.sum() == pytest.approx(counts.sum())
        assert (loads >= counts[holds.sum(axis=1) == 1] @ holds[holds.sum(axis=1) == 1]).all()
        assert loads.max() >= best - 1e-9
        filled.append(loads.max() / best)
        even.append(split_evenly(holds, counts).max() / best)
    assert np.mean(filled) < 1.03
    assert np.mean(filled) - 1 < (np.mean(even) - 1) / 4


@pytest.mark.parametrize("seed", range(40))
def test_filling_up_again_and_again_is_best_for_all(seed: int) -> None:
    holds, counts = random_case(seed, num_replicated=6)
    loads = fill_up(holds, counts, rounds=200)
    assert loads.sum() == pytest.approx(counts.sum())
    assert loads.max() == pytest.approx(least_maximum(holds, counts), rel=1e-3)


def test_what_can_be_worked_out_by_hand() -> None:
    holds = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 1]], bool)
    counts = np.array([6.0, 2.0, 7.0])
    assert split_evenly(holds, counts) == pytest.approx([6 + 7 / 3, 2 + 7 / 3, 7 / 3])
    assert fill_up(holds, counts) == pytest.approx([6, 4.5, 4.5])
    assert fill_up(holds, np.zeros(3)) == pytest.approx([0, 0, 0])
    assert imbalance(np.array([6, 4.5, 4.5])) == pytest.approx(0.2)
    assert imbalance(np.zeros(3)) == 0.0
