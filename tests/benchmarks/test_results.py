import datetime
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.results import (
    ROOT,
    Row,
    describe_machine,
    recorded_command,
    source_state,
    this_machine,
    write_results,
)

EPYC = """processor\t: 0
model name\t: AMD EPYC 9R45
flags\t\t: fpu sse avx2 avx512f avx512_bf16 amx_tile
"""
XEON = """model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16
"""
ARM = "Features\t: fp asimd sve bf16\n"


@pytest.mark.parametrize(
    ("cpuinfo", "num_cores", "expected"),
    [
        (EPYC, 2, "amd-epyc-2c-avx512bf16"),
        (XEON, 48, "intel-xeon-48c-amxbf16"),
        (ARM, 4, "cpu-4c-armbf16"),
        ("", 1, "cpu-1c"),
    ],
    ids=["epyc", "xeon", "arm", "unknown"],
)
def test_describe_machine(cpuinfo: str, num_cores: int, expected: str) -> None:
    assert describe_machine(cpuinfo, num_cores) == expected


def test_an_accelerator_leads_the_machine_s_name() -> None:
    assert this_machine("NVIDIA H200") == f"nvidia-h200-{this_machine()}"


def test_row_summarises_samples() -> None:
    row = Row.of("decode", [3.0, 1.0, 2.0, 10.0], "tok/s", limit=20.0, ratio=1.5)
    assert row == Row("decode", 2.5, "tok/s", 2.5, 1.0, 10.0, 4, 20.0, 1.5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "python -m benchmarks.x"),
        (["--model", "a b", "--save"], "python -m benchmarks.x --model 'a b' --save"),
        (["--model", "../up/model"], "python -m benchmarks.x --model ../up/model"),
        (["--model", "/mnt/models/big"], "python -m benchmarks.x --model FOLDER/big"),
        (["--model=/mnt/models/big/"], "python -m benchmarks.x --model=FOLDER/big"),
        (["--cache", str(ROOT / "build" / "c")], "python -m benchmarks.x --cache build/c"),
        (["--jobs", "1x128/64"], "python -m benchmarks.x --jobs 1x128/64"),
    ],
    ids=["bare", "quoted", "relative", "outside", "outside-joined", "inside", "no-path"],
)
def test_a_command_can_be_run_again_and_names_no_machine_s_path(
    arguments: list[str], expected: str
) -> None:
    assert recorded_command("benchmarks.x", arguments) == expected


def test_row_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="decode: no samples"):
        Row.of("decode", [], "tok/s")


def test_write_results_has_the_form_that_readers_rely_on(tmp_path: Path) -> None:
    path = write_results(
        "peers-cpu",
        [Row.of("decode", [1.0, 2.0, 3.0], "tok/s", ratio=0.5)],
        command="python -m benchmarks.peers",
        numerics_id="reference-avx2",
        machine="amd-epyc-2c",
        folder=tmp_path / "results",
        today=datetime.date(2026, 1, 31),
    )
    assert path == tmp_path / "results" / "20260131-peers-cpu-amd-epyc-2c.json"
    document = json.loads(path.read_text())
    assert list(document) == [
        "schema", "command", "commit", "dirty", "machine", "numerics_id", "rows",
    ]  # fmt: skip
    assert document["schema"] == 1
    assert document["command"] == "python -m benchmarks.peers"
    assert document["numerics_id"] == "reference-avx2"
    assert document["rows"] == [
        {
            "name": "decode",
            "value": 2.0,
            "unit": "tok/s",
            "median": 2.0,
            "min": 1.0,
            "max": 3.0,
            "n": 3,
            "limit": None,
            "ratio": 0.5,
        }
    ]


@pytest.mark.parametrize("name", ["", "Peers", "a b", "../up", "-a"])
def test_a_name_that_is_no_slug_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower-case words"):
        write_results(name, [], command="true", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_nan_is_refused(tmp_path: Path) -> None:
    rows = [Row.of("decode", [float("nan")], "tok/s")]
    with pytest.raises(ValueError, match="nan"):
        write_results("decode", rows, command="true", folder=tmp_path)


def _git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    command = ("git", *identity, *arguments)
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


def test_source_state_sees_changes_but_not_results(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("a = 1\n")
    _git(tmp_path, "add", "a.py")
    _git(tmp_path, "commit", "-q", "-m", "a")
    commit = _git(tmp_path, "rev-parse", "HEAD").strip()
    assert source_state(tmp_path) == (commit, False)

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "x.json").write_text("{}")
    assert source_state(tmp_path) == (commit, False)

    (tmp_path / "a.py").write_text("a = 2\n")
    assert source_state(tmp_path) == (commit, True)


def test_source_state_without_a_repository_is_unknown(tmp_path: Path) -> None:
    assert source_state(tmp_path) == ("unknown", True)


def test_the_commit_of_a_tree_without_git_is_what_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMMIT", raising=False)
    assert source_state(tmp_path) == ("unknown", True)
    (tmp_path / "COMMIT").write_text("abc\n")
    assert source_state(tmp_path) == ("abc", False)
    monkeypatch.setenv("COMMIT", "def")
    assert source_state(tmp_path) == ("def", False)
    # of a clone, what git says
    assert source_state(ROOT)[0] != "def"
