from __future__ import annotations

import pytest

from benchmarks.gpu.figures import (
    Failure,
    Figure,
    against,
    attempted,
    compared,
    plain,
    rate,
)


def test_a_rate_is_a_share_of_what_the_machine_gives() -> None:
    figure = rate("copy", [0.5, 1.0, 2.0], 10.0, "GB/s", limit=20.0, goal=0.6)
    assert (figure.row.value, figure.row.min, figure.row.max, figure.row.n) == (10.0, 5.0, 20.0, 3)
    assert figure.row.ratio == pytest.approx(0.5)
    assert not figure.is_met
    assert rate("copy", [0.5], 10.0, "GB/s", limit=20.0, goal=0.6).is_met


def test_a_time_is_beside_the_least_it_could_be() -> None:
    figure = against("step", [0.004, 0.002], limit_s=0.0015, goal=0.5)
    assert figure.row.unit == "ms"
    assert figure.row.value == pytest.approx(3.0)
    assert figure.row.limit == pytest.approx(1.5)
    assert figure.row.ratio == pytest.approx(0.5)
    assert figure.is_met


def test_what_may_be_slower_by_so_much_at_most() -> None:
    assert compared("exact", [1.3], [1.0], goal=1.3, is_most=True).is_met
    assert not compared("exact", [1.31], [1.0], goal=1.3, is_most=True).is_met
    assert compared("static", [1.2], [1.0], goal=1.2).is_met
    assert not compared("static", [1.0], [1.2], goal=1.2).is_met


def test_verdicts() -> None:
    met = rate("a", [1.0], 1.0, "GB/s", limit=1.0, goal=0.9)
    missed = rate("a", [2.0], 1.0, "GB/s", limit=1.0, goal=0.9)
    assert [one.verdict(False) for one in (met, missed, plain("a", [1.0], "s"))] == [
        "met", "MISSED", "",
    ]  # fmt: skip
    assert missed.verdict(True) == "dry"
    assert "MISSED" in missed.line(False)
    assert ">=0.9" in missed.line(False)
    # without a ratio there is nothing that could be met
    assert not Figure(row=plain("a", [1.0], "s").row, goal=0.5).is_met


def test_documents_are_read_back() -> None:
    figure = rate("copy", [0.5, 1.0], 10.0, "GB/s", limit=20.0, goal=0.6)
    assert Figure.read(figure.document()) == figure


def test_what_fails_does_not_take_down_what_was_measured() -> None:
    def measure():  # type: ignore[no-untyped-def]
        yield plain("first", [1.0], "s")
        raise RuntimeError("no memory\nand more")

    found = list(attempted("part", measure))
    assert found[0] == plain("first", [1.0], "s")
    assert found[1] == Failure("part", "RuntimeError: no memory")
