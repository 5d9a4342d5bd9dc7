from __future__ import annotations

from typing import Any

import pytest

from benchmarks.serving.overload import Load, Outcome, faults_of, outcome_of, rows_of

LOAD = Load(rate=10.0, seconds=30.0, input_len=8, output_len=4, goal_s=2.0, seed=1)


def record(end_s: float, ttft_s: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"end_s": end_s, "ttft_s": ttft_s, "failure": None, "retry_after": None, **more}


def outcome(*records: dict[str, Any]) -> Outcome:
    found = outcome_of(LOAD, records, 0.5)
    found.rss_mb = [100.0] * 9
    return found


def test_goodput_is_of_answers_that_ended_within_the_measured_part() -> None:
    inside = [record(20.0)] * 40
    found = outcome(*inside, record(9.9), record(30.1), record(20.0, 2.1))
    assert found.goodput == pytest.approx(2.0)
    assert found.served_per_s == pytest.approx(2.05)
    assert not found.is_beyond_knee


def test_the_knee_is_where_some_wait_too_long_or_are_refused() -> None:
    refused = record(1.0, failure="http 503", retry_after="3")
    assert outcome(*[record(20.0)] * 95, *[refused] * 5).is_beyond_knee
    assert outcome(*[record(20.0, 3.0)] * 5, record(20.0)).is_beyond_knee


def test_each_fault_is_told() -> None:
    refused = record(1.0, failure="http 503", retry_after="3")
    step, over = outcome(*[record(20.0)] * 40), outcome(*[record(20.0)] * 33, *[refused] * 60)
    assert faults_of([step], over, 4) == []
    rows = {row.name: row for row in rows_of([step], over, 4)}
    assert rows["goodput at overload, ratio to the best"].ratio == pytest.approx(33 / 40)
    bad = outcome(
        *[record(20.0)] * 31,
        record(1.0, failure="http 503"),
        record(1.0, failure="http 500"),
    )
    bad.most_queued, bad.rss_mb = 5, [100.0] * 6 + [200.0] * 3
    words = ("78%", "without Retry-After", "http 500", "5 queued", "grew by 100")
    faults = faults_of([step], bad, 4)
    assert len(faults) == len(words)
    for fault, word in zip(faults, words, strict=True):
        assert word in fault
