"""`moe-serve place`: a table, JSON, plots and a file, or a message that says what to give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_serve import cli, plugin
from moe_serve.experts.placement_file import FORMATS, read_placement
from moe_serve.experts.trace import write_trace
from tests.experts.routing import synthetic_trace


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("traces")
    paths = folder / "one.npz", folder / "two.npz"
    for seed, path in enumerate(paths):
        write_trace(path, synthetic_trace(seed=seed))
    return paths


def run(*arguments: str | Path) -> int:
    return cli.run([str(argument) for argument in arguments])


def test_a_table_with_baselines_a_file_and_plots(
    traces: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "placement.json"
    code = run(
        "place", traces[0], "--ranks", "4", "--nodes", "2", "--strategy", "joint", "--strategy",
        "affinity", "--other", traces[1], "-o", target, "--plots", tmp_path / "plots",
    )  # fmt: skip
    assert code == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "4 ranks on 2 nodes; ranks/token at least" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == [
        name for name in ("contiguous", "eplb", "joint", "affinity") for _ in range(3)
    ]
    assert "affinity gains nothing by its hops where tokens return home" in err
    assert "modelled, not measured" in err
    placement = read_placement(target)
    assert placement.strategy == "joint"
    assert (placement.mesh.num_ranks, placement.mesh.ranks_per_node) == (4, 2)
    assert placement.trained_on["trace"] == "one"
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "pareto.png", "traffic.png",
    ]  # fmt: skip


def test_what_was_written_can_be_judged_also_in_sglangs_form(
    traces: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = tmp_path / "p.json", tmp_path / "s.json"
    assert run("place", traces[0], "--ranks", "4", "-o", ours, "--export", f"sglang:{theirs}") == 0
    capsys.readouterr()
    for given in (ours, theirs):
        assert run("place", traces[0], "--ranks", "4", "--given", given, "--json") == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        by_name = {(row["strategy"], row["part"]): row for row in rows}
        for part in ("training", "held out"):
            figures = [by_name[name, part] for name in ("joint", "given")]
            assert figures[0]["ranks_per_token"] == figures[1]["ranks_per_token"]
            assert figures[0]["imbalance"] == figures[1]["imbalance"]
    assert run("place", traces[0], "--ranks", "2", "--given", ours) != 0
    assert "is of 3 layers of 16 experts on 4 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("name", plugin.names(FORMATS))
def test_what_is_exported_can_be_judged(
    traces: tuple[Path, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    common = ("place", traces[0], "--ranks", "4", "--json")
    assert run(*common, "--strategy", "contiguous", "--export", f"{name}:{path}") == 0
    capsys.readouterr()
    assert run(*common, "--given", path) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    figures = {row["strategy"]: row["imbalance"] for row in rows if row["part"] == "held out"}
    assert figures["given"] == figures["contiguous"]


def test_json_has_every_figure(
    traces: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("place", traces[0], "--ranks", "4", "--strategy", "eplb", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["definitions"] == 1
    assert [(row["strategy"], row["part"]) for row in result["rows"]] == [
        (name, part) for name in ("contiguous", "eplb") for part in ("training", "held out")
    ]
    for row in result["rows"]:
        assert row["ranks_per_token"] >= 1
        assert set(row["bytes_two_exchange"]) == {"per_expert", "dedup", "all_gather", "partial"}
        assert len(row["traffic"]) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--nodes", "3"), "4 ranks cannot be shared evenly by 3 nodes"),
        (("--strategy", "best"), "joint"),
        (("--slots", "1"), "give at least"),
        (("-o", "/proc/none/p.json"), "its folder is not there"),
        (("--topology", "/nowhere.json"), "not a topology"),
        (("--export", "p.json"), "'p.json' is not FORMAT:FILE, where FORMAT is one of eplb"),
        (("--export", "sglan:p.json"), "there is no 'sglan'"),
        (("--export", "sglang:/proc/none/p.json"), "its folder is not there"),
    ],
)
def test_what_cannot_be_is_refused(
    traces: tuple[Path, Path],
    arguments: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("place", traces[0], "--ranks", "4", *arguments) in (2, 3)
    assert says in capsys.readouterr().err
