"""Tests on this device: our own checks in a plain loop, and pytest's GPU tests where it is here."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.cases import Bench
from benchmarks.gpu.checks import CHECKS, CheckFailed
from benchmarks.gpu.figures import Failure, Figure, attempted
from benchmarks.gpu.setting import Setting, installed
from benchmarks.gpu.shapes import REAL, TINY
from benchmarks.results import ROOT, Row
from moe_serve.kernels import suite

_MARK = "mark.gpu"
# around the sizes of tiles, and what has no round number
_ROWS, _DRY_ROWS = (1, 17, 129, 700), (5,)
_PYTEST_S = 400


def run(setting: Setting) -> Iterator[Figure | Failure]:
    """Run the checks at every shape; then pytest."""
    for shape_name, shape in setting.pick(REAL, {"tiny": TINY}).items():
        for numerics in ("exact", "fast"):
            bench = Bench(shape, suite.load(setting.kernels, numerics=numerics))
            for name in CHECKS:
                for num_rows in setting.pick(_ROWS, _DRY_ROWS):
                    told = f"{shape_name}, {numerics}, {name}, {num_rows} rows"
                    if not setting.wants(told):
                        continue
                    one = partial(checked, bench, name, num_rows, numerics == "exact", told)
                    yield from attempted(told, one)
    if installed("pytest"):
        yield from attempted("pytest", partial(_by_pytest, setting))
    else:
        print("-- pytest is not here: the checks above are what ran", flush=True)


def checked(bench: Bench, name: str, num_rows: int, is_exact: bool, told: str) -> Iterator[Figure]:
    """Run one check."""
    with torch.inference_mode():
        try:
            CHECKS[name](bench, num_rows, is_exact)
            passed = 1.0
        except CheckFailed as error:
            print(f"-- {told}: {error}", flush=True)
            passed = 0.0
    yield Figure(row=Row.of(told, [passed], "passed", ratio=passed), goal=1.0)


def gpu_test_files(root: Path = ROOT) -> list[str]:
    """Return the files with tests for a GPU: others may import what is not installed here."""
    paths = sorted((root / "tests").rglob("test_*.py"))
    return [str(path.relative_to(root)) for path in paths if _MARK in path.read_text()]


def _by_pytest(setting: Setting) -> Iterator[Figure]:
    files = gpu_test_files()
    files = setting.pick(files, files[:1])
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", *files],
        cwd=ROOT, timeout=_PYTEST_S, check=False, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    print(done.stdout, end="", flush=True)
    counts, num_passed = counted(done.stdout)
    passed = float(done.returncode == 0 and num_passed > 0)
    yield Figure(row=Row.of(f"pytest -m gpu: {counts}", [passed], "passed", ratio=passed), goal=1.0)


def counted(printed: str) -> tuple[str, int]:
    """Return what pytest's last line counts, and how many tests passed."""
    found = re.findall(
        r"(\d+) (passed|failed|skipped|errors?)\b", (printed.splitlines() or [""])[-1]
    )
    num_passed = sum(int(count) for count, what in found if what == "passed")
    return ", ".join(f"{count} {what}" for count, what in found) or "no test", num_passed
