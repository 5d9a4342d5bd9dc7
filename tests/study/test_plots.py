"""Plots: one file for each kind of figure, and a clear word where they cannot be made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_serve.errors import ConfigError
from moe_serve.study.plots import check_available, write_plots
from moe_serve.study.simulate import SimulateOptions, simulate
from tests.experts.routing import synthetic_trace


def test_every_kind_of_figure_is_drawn(tmp_path: Path) -> None:
    trace = synthetic_trace()
    options = SimulateOptions(
        policies=("lru", "belady"), slots=(4, 6), batches=(1, 2), scopes=("layer", "global"),
        predictors=("popularity", "oracle"), record_bytes=1000, layer_s=1e-3, link_bytes_s=1e9,
    )  # fmt: skip

    written = write_plots(simulate(trace, options), trace, tmp_path / "new" / "folder")

    assert [path.name for path in written] == [
        "misses.png", "clock.png", "misses-global.png", "clock-global.png", "guesses.png",
        "experts.png",
    ]  # fmt: skip
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 100_000


def test_without_guesses_and_clock_there_are_two(tmp_path: Path) -> None:
    trace = synthetic_trace()
    options = SimulateOptions(policies=("lru",), slots=(5,), batches=(1,))

    written = write_plots(simulate(trace, options), trace, tmp_path)

    assert [path.name for path in written] == ["misses.png", "experts.png"]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file: cannot be written \(File exists\)"):
        write_plots({"rows": []}, synthetic_trace(), tmp_path / "file")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'moe-serve\[study\]'"):
        check_available()
