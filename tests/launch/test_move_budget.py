"""Experts that travel take a tenth of the time of steps at most, whatever a move costs."""

from __future__ import annotations

import random

import pytest

from moe_serve.launch.move_budget import MoveBudget


@pytest.mark.parametrize("fixed_s", [0.0002, 0.002, 0.02])
@pytest.mark.parametrize("byte_s", [1e-10, 1e-8])
def test_moves_take_a_tenth_and_end(fixed_s: float, byte_s: float) -> None:
    """Records of 100,000 bytes; a step takes 10 ms, and what is measured is noisy."""
    chance = random.Random(1)
    budget, left, record = MoveBudget(), 200, 100_000
    steps_s = moving_s = 0.0
    num_steps = 0
    while left:
        most = budget.next_bytes()
        moved = min(left, max(1, most // record)) if most else 0
        move_s = (fixed_s + moved * record * byte_s) * chance.uniform(0.8, 1.5) if moved else 0.0
        step_s = 0.01 * chance.uniform(0.8, 1.3)
        budget.told(step_s + move_s, moved * record, move_s)
        left -= moved
        steps_s += step_s
        moving_s += move_s
        num_steps += 1
    all_s = 200 * record * byte_s
    assert moving_s < 0.1 * steps_s + 2 * (fixed_s + record * byte_s)
    assert num_steps < 60 + 30 * (all_s + 10 * fixed_s) / 0.001


def test_a_given_number_of_bytes_is_kept() -> None:
    budget = MoveBudget(12_345)
    budget.told(1.0, 12_345, 0.9)
    assert budget.next_bytes() == 12_345


def test_the_first_move_is_as_small_as_can_be() -> None:
    assert MoveBudget().next_bytes() == 1
