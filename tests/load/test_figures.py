"""Figures out of records."""

from __future__ import annotations

from typing import Any

import pytest

from moe_serve.errors import ConfigError
from moe_serve.load.connection import Address, ConnectionPool
from moe_serve.load.figures import (
    is_good,
    latency,
    lines_of,
    notes_of,
    percentile,
    read_goals,
    report_of,
)
from moe_serve.load.records import RequestRecord
from moe_serve.load.run import LoadRun, RunLimits


def record(index: int = 0, ttft_s: float = 0.5, **more: Any) -> RequestRecord:
    """A request of ten tokens, 0.1 s each after the first, that was sent a second late."""
    first_s = 10.0 + ttft_s
    fields: dict[str, Any] = {
        "index": index,
        "intended_s": 10.0,
        "sent_s": 11.0,
        "end_s": first_s + 1.0,
        "chunk_s": [first_s, first_s + 0.9],
        "input_tokens": 5,
        "output_tokens": 10,
        "is_counted": True,
    }
    return RequestRecord(**fields | more)


def run_of(*records: RequestRecord, **more: Any) -> LoadRun:
    pool = ConnectionPool(Address("h", 1, False, ""), {})
    return LoadRun(
        pool, "/", [], [], RunLimits(), records=list(records), start_s=10.0, wall_s=4.0, **more
    )


def test_percentiles() -> None:
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([0.0, 1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([float(i) for i in range(101)], 0.99) == pytest.approx(99.0)
    assert percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)
    row = latency("x", [3.0, 1.0, 2.0])
    assert row is not None
    assert (row.median, row.mean, row.min, row.max, row.n) == (2.0, 2.0, 1.0, 3.0, 3)
    assert latency("x", []) is None


def test_goals() -> None:
    goals = read_goals(["ttft:2000", "tpot:105"])
    assert goals == {"ttft": 2.0, "tpot": 0.105}
    for given, says in (
        (["ttft"], "write ttft:MS"),
        (["itl:3"], "write ttft:MS"),
        (["ttft:x"], "'x' is no number"),
        (["ttft:0"], "above 0"),
        (["ttft:nan"], "above 0"),
        (["e2e:1", "e2e:2"], "twice"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_goals(given)
    assert is_good(record(ttft_s=2.0), goals)
    assert not is_good(record(ttft_s=2.1), goals)
    assert is_good(record(ttft_s=2.1), goals, from_sending=True)
    assert not is_good(record(output_tokens=9), goals)  # 0.9 s for eight of them
    assert not is_good(record(failure="timeout"), goals)
    assert is_good(record(chunk_s=[10.5], output_tokens=1), goals)
    assert not is_good(record(), {"e2e": 1.4})


def test_the_report_and_its_table() -> None:
    run = run_of(
        record(),
        record(1, ttft_s=1.5, is_counted=False),
        record(2, failure="http 503", message="full\x1b", retry_after="2"),
        record(3, failure="unfinished", sent_s=None, end_s=None, chunk_s=[]),
        is_interrupted=True,
        cpu_share=0.9,
        peak_concurrency=4,
    )
    report = report_of(run, {"ttft": 1.0}, "a command", {"seed": 1})
    values = {row["name"]: row["value"] for row in report["rows"]}
    assert (values["requests"], values["output"], values["total"]) == (0.5, 5.0, 7.5)
    assert (values["goodput"], values["goodput from send"]) == (0.25, 0.5)
    assert (values["ttft"], values["e2e"]) == (1.0, 2.0)
    assert (values["ttft from send"], values["sent late"]) == (0.0, 1.0)
    assert (report["schema"], report["command"], report["num_good"]) == (1, "a command", 1)
    assert {kind: f["count"] for kind, f in report["failures"].items()} == {
        "http 503": 1,
        "unfinished": 1,
    }
    lines = lines_of(report)
    assert lines[0].startswith("2 of 4 requests answered in 4 s, 4 at once at most")
    assert "failed, http 503: 1, Retry-After 2: full\x1b" in lines
    (ttft,) = (line.split() for line in lines if line.startswith("ttft  "))
    assert ttft == ["ttft", "1000.00", "1000.00", "1400.00", "1490.00", "1500.00", "2"]
    interrupted, guessed, busy = notes_of(report)
    assert "interrupted" in interrupted
    assert "1 answers came without usage" in guessed
    assert "90% of a core" in busy


def test_a_report_of_nothing() -> None:
    report = report_of(run_of(), {}, "", {})
    assert report["num_answered"] == 0
    assert [row["value"] for row in report["rows"]] == [0.0, 0.0, 0.0]
    assert report["num_good"] is None
    assert lines_of(report)[0].startswith("0 of 0 requests answered")
