"""docs/serving_figures.md says what the files of results say."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import results
from benchmarks.serving import summary


def test_the_page_has_the_newest_figures() -> None:
    found = summary.newest()
    told = summary.table(
        summary.rows_of(found), {name: document["command"] for name, document in found.items()}
    )
    page = summary.PAGE.read_text()
    assert summary.with_table(page, told) == page
    assert all(f"| {name} |" in page for name in summary.ORDER)


def test_the_one_file_has_them_too() -> None:
    path = sorted(results.RESULTS.glob("*-serving-all-*.json"))[-1]
    rows = json.loads(path.read_text())["rows"]
    assert rows == [dataclasses.asdict(row) for row in summary.rows_of(summary.newest())]


def test_what_must_be_none_is_none() -> None:
    """Figures may miss a goal of speed; of these there must be none."""
    rows = {row.name: row for row in summary.rows_of(summary.newest())}
    wanted = [
        "kills: different from an undisturbed run", "kills: clients hung", "kills: orphans",
        "kills: shared memory left", "kills: kills with a fault", "faults: faults with a problem",
        "disconnects: of these different", "sockets: honest streams that were different",
        "bad-inputs: answers that should not be", "bad-inputs: of these different",
    ]  # fmt: skip
    assert {name: rows[name].value for name in wanted} == dict.fromkeys(wanted, 0)
    assert rows["kills: kills"].value >= 60
    assert rows["bad-inputs: tries"].value >= 20_000


def test_a_measurement_that_was_not_made_is_named(tmp_path: object) -> None:
    with pytest.raises(ValueError, match="nothing is kept of speed"):
        summary.newest(tmp_path)  # type: ignore[arg-type]
