"""The line of figures: rates between two reports, and no line where nothing happened."""

from __future__ import annotations

import logging
import time

import pytest

from moe_serve.launch.stats_line import StatsLine, line_of
from moe_serve.server.messages import StatsReport
from tests.server.test_metrics import stats


def report(**given: object) -> StatsReport:
    return StatsReport(stats=stats(**given), num_resubmitted=0, num_worlds_lost=0)


def test_it_tells_what_happened_in_between() -> None:
    line = line_of(report(), report(num_prompt_tokens=260, num_generation_tokens=140), 10.0)
    assert line == (
        "prompt 20.0 tok/s | output 10.0 tok/s | running 2, waiting 0 | KV 25.0 % | "
        "prefix hits 20.0 % | preemptions 1 | expert hits 70.0 % | waited for experts 0.2 s | "
        "imbalance 1.50"
    )


def test_a_world_formed_anew_counts_from_its_begin() -> None:
    line = line_of(report(num_steps=50), report(num_steps=1, num_prompt_tokens=5), 1.0)
    assert line.startswith("prompt 5.0 tok/s | output 40.0 tok/s")


def test_a_line_comes_when_it_is_due(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    caplog.set_level(logging.INFO)
    lines = StatsLine(10.0)
    for now_s in (1.0, 4.0, 10.0, 11.0, 12.0, 22.0):  # noqa: B007
        lines.take(report())
    assert len(caplog.records) == 2
