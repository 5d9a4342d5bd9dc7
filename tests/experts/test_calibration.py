"""The gate: precision as counted, thresholds that pay, and a change of what is asked."""

from __future__ import annotations

import numpy as np
import pytest

from moe_serve.experts.calibration import Calibration

BREAK_EVEN = 0.75


def feed(calibration: Calibration, power: float, num_events: int, seed: int = 0) -> None:
    """Record events of 20 guesses; one that says p comes true with probability p ** power."""
    source = np.random.default_rng(seed)
    for _ in range(num_events):
        said = source.random(20).astype(np.float32)
        calibration.record(1, said, source.random(20) < said**power)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_precision_converges_to_the_true_one(power: float) -> None:
    calibration = Calibration(furthest=2)
    feed(calibration, power, 1500)
    for said in (0.325, 0.625, 0.925):
        precision = calibration.precision(1, said)
        assert precision == pytest.approx(said**power, abs=0.06)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_threshold_is_where_guesses_begin_to_pay(power: float) -> None:
    calibration = Calibration(furthest=2)
    feed(calibration, power, 1500)
    threshold = calibration.threshold(1, BREAK_EVEN)
    assert threshold == pytest.approx(BREAK_EVEN ** (1 / power), abs=0.09)


def test_nothing_is_issued_without_evidence() -> None:
    calibration = Calibration(furthest=2)
    assert calibration.threshold(1, BREAK_EVEN) is None
    assert calibration.precision(1, 0.9) is None
    calibration.record(1, np.full(5, 0.9, np.float32), np.ones(5, bool))
    assert calibration.threshold(1, BREAK_EVEN) is None
    feed(calibration, 1.0, 1500)
    assert calibration.threshold(1, BREAK_EVEN) is not None
    assert calibration.threshold(2, BREAK_EVEN) is None, "distances are apart"


def test_nothing_is_issued_where_no_guess_is_good_enough() -> None:
    calibration = Calibration(furthest=1)
    source = np.random.default_rng(0)
    for _ in range(500):
        calibration.record(1, source.random(20), source.random(20) < 0.4)
    assert calibration.threshold(1, BREAK_EVEN) is None
    assert calibration.threshold(1, 0.3) is not None


def test_recovers_after_drift() -> None:
    calibration = Calibration(furthest=1)
    feed(calibration, 0.5, 1500)
    before = calibration.threshold(1, BREAK_EVEN)
    feed(calibration, 4.0, 4000, seed=1)
    after = calibration.threshold(1, BREAK_EVEN)
    assert before is not None
    assert after is not None
    assert after > before + 0.2
    precision = calibration.precision(1, 0.625)
    assert precision == pytest.approx(0.625**4, abs=0.1)


def test_a_probability_of_one_is_counted() -> None:
    calibration = Calibration(furthest=1)
    for _ in range(10):
        calibration.record(1, np.ones(10, np.float32), np.ones(10, bool))
    assert calibration.precision(1, 1.0) == 1.0
    assert calibration.threshold(1, 0.99) == pytest.approx(0.95)


def test_an_event_without_candidates_changes_nothing() -> None:
    calibration = Calibration(furthest=1)
    feed(calibration, 1.0, 200)
    before = calibration.precision(1, 0.5)
    calibration.record(1, np.zeros(0, np.float32), np.zeros(0, bool))
    assert calibration.precision(1, 0.5) == before
