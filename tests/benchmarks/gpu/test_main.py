from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import outcome as outcomes
from benchmarks.gpu.figures import Failure, Figure, plain, rate
from benchmarks.gpu.outcome import Outcome, summary
from benchmarks.gpu.setting import Setting


def part_of(monkeypatch: pytest.MonkeyPatch, name: str, found: list[object]) -> None:
    """Make a part that yields figures, and raises errors."""

    def run(setting: Setting) -> Iterator[object]:
        for one in found:
            if isinstance(one, Exception):
                raise one
            yield one

    module = types.ModuleType(f"made_up_{name}")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(outcomes.PARTS, name, module.__name__)


def test_a_part_that_fails_takes_no_other_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = rate("good", [1.0], 1.0, "GB/s", limit=1.0, goal=0.5)
    part_of(monkeypatch, "first", [good, RuntimeError("out of memory")])
    part_of(monkeypatch, "second", [good, Failure("a kernel", "CompilationError: no")])
    part_of(monkeypatch, "third", [good])
    assert command.main(["first", "second", "third", "--dry"]) == 1
    printed = capsys.readouterr().out
    assert "first      FAILED  RuntimeError: out of memory" in printed
    assert "second     FAILED  a kernel: CompilationError: no" in printed
    assert printed.rstrip().endswith("3 have goals; 2 parts failed")
    assert command.main(["third", "--dry"]) == 0


def test_a_part_ends_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part_of(monkeypatch, "long", [plain(str(number), [1.0], "s") for number in range(9)])
    assert command.main(["long", "--dry", "--seconds", "1e-9"]) == 1
    assert "stopped after 1e-09 s" in capsys.readouterr().out


def test_a_process_that_dies_is_an_outcome() -> None:
    found = command.run_apart("ceilings", ["--seconds", "-1"], 60)
    assert found.part == "ceilings"
    assert found.errors == ["its process ended with status 2"]


def test_a_process_tells_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    assert command.main(["ceilings", "--dry", "--outcome", str(path)]) == 0
    found = Outcome.read(json.loads(path.read_text()))
    assert found.part == "ceilings"
    assert found.is_dry
    assert found.error is None
    assert len(found.figures) > 10
    assert found.environment["torch"]


def test_options_reach_each_process() -> None:
    given = ["kernels", "--trace", __file__, "--only", "moe", "--scratch", "there"]
    arguments = command.parse_arguments(given)
    passed = command.parse_arguments(["kernels", *command.options_of(arguments)])
    assert vars(passed) == vars(arguments)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["no-such-part"], "there are: ceilings, tests"),
        (["--seconds", "0"], "must be above 0"),
        (["--dry", "--save"], "leave out --save"),
        (["--folder", "there"], "with --save"),
        (["--trace", "/nowhere/a.npz"], "/nowhere/a.npz: there is no such file"),
        (["--dry", "--sav"], "unrecognized arguments: --sav"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_refused(
    given: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.parse_arguments(given)
    assert says in capsys.readouterr().err


def test_what_is_missing_is_said_once_and_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_NEEDED", ("numpy", "no_such_package"))
    assert command.main(["--dry"]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert "has no no_such_package; install" in told.err
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main([]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert told.err == "there is no GPU here; DRY=1 walks all steps without one\n"


def test_a_name_that_nothing_has_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["kernels", "--dry", "--only", "no such kernel"]) == 1
    assert "nothing has 'no such kernel' in its name" in capsys.readouterr().out
    assert command.main(["kernels", "--dry", "--only", "FAST, rms"]) == 0
    assert "fast, rms" in capsys.readouterr().out


def test_a_dry_run_without_triton_says_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    found = Outcome(part="kernels", is_dry=True, kernels="reference")
    assert "Triton is not here: torch's operations stood in" in summary([found])
    found.kernels = "triton"
    assert "Triton" not in summary([found])


def test_the_environment_asks_for_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, is_dry in (("1", True), ("", False), ("0", False)):
        monkeypatch.setenv("DRY", value)
        assert command.parse_arguments([]).dry is is_dry
    monkeypatch.setenv("DRY", "yes")
    with pytest.raises(SystemExit, match="2"):
        command.parse_arguments([])


def test_figures_are_kept_with_card_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "kernels", "decode", "--save"])
    arguments = command.parse_arguments(["kernels", "decode", "--save", "--folder", str(tmp_path)])
    found = Outcome(part="decode", card="nvidia-h200", environment={"driver": "580"})
    found.add(plain("step", [1.0, 2.0], "ms"))
    found.add(Failure("batch 256", "OutOfMemoryError: no"))
    path = found.save(arguments)
    assert path.name.endswith("-gpu-decode-nvidia-h200.json")
    document = json.loads(path.read_text())
    assert document["environment"] == {
        "driver": "580",
        "errors": ["batch 256: OutOfMemoryError: no"],
    }
    assert document["command"] == "python -m benchmarks.gpu decode --save"
    assert document["rows"][0]["median"] == 1.5


def test_the_table_lists_goals_and_counts_tests() -> None:
    found = Outcome(part="decode")
    found.add(rate("fast one", [1.0], 1.0, "GB/s", limit=1.0, goal=0.6))
    found.add(rate("slow one", [4.0], 1.0, "GB/s", limit=1.0, goal=0.6))
    found.add(plain("no goal", [1.0], "s"))
    tests = Outcome(part="tests")
    for ratio in (1.0, 0.0):
        row = plain(f"test {ratio:g}", [ratio], "passed").row
        tests.add(Figure(row=replace(row, ratio=ratio), goal=1.0))
    told = summary([found, tests])
    assert "decode     met        1.000   >=0.6  fast one" in told
    assert "decode     MISSED     0.250   >=0.6  slow one" in told
    assert "no goal" not in told
    assert "test 1" not in told
    assert "tests      MISSED     0.000     >=1  test 0" in told
    assert "1 tests passed" in told
    assert told.endswith("2 of 4 goals met; 0 parts failed")


def test_every_part_names_a_module() -> None:
    for module in outcomes.PARTS.values():
        assert Path(*module.split(".")).with_suffix(".py").name in {
            path.name for path in Path(command.__file__).parent.iterdir()
        }
