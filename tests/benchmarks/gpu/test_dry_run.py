"""The whole run without a GPU, where nothing is installed but what the engine itself needs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.outcome import PARTS
from benchmarks.results import RESULTS, ROOT

NEEDED = ("torch", "numpy", "safetensors", "msgspec")
HAS_TRITON = importlib.util.find_spec("triton") is not None

# runs in a process of its own: all packages are forbidden but those named, and what these need
BARE = '''
import re, runpy, sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, requires

def with_dependencies(name, found):
    if name not in found:
        found.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            lines = []
        for line in lines:
            if "extra ==" not in line:
                with_dependencies(re.match(r"[A-Za-z0-9_.-]+", line)[0], found)
    return found

allowed = sys.argv[1].split(",")
known = {"moe_serve", "benchmarks", "torchgen", "functorch"}
known |= {name.lower() for name in sys.stdlib_module_names}
for package in allowed:
    known |= {name.replace("-", "_").lower() for name in with_dependencies(package, set())}

class Known:
    """Finds what a path finder does, but for all other packages, which are as if not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        root = name.partition(".")[0].lower()
        if root in known or root.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)
        return None

sys.meta_path = [Known if one is PathFinder else one for one in sys.meta_path]
sys.argv = ["benchmarks.gpu", *sys.argv[2:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
'''


def run_bare(packages: tuple[str, ...], *arguments: str) -> str:
    """Run with nothing but `packages`; return what was printed."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, ",".join(packages), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def table_of(printed: str) -> str:
    """Return the table at the end."""
    return printed[printed.index("\npart ") :]


@pytest.mark.parametrize(
    "packages",
    [
        NEEDED,
        pytest.param(
            (*NEEDED, "triton"),
            marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
        ),
    ],
    ids=["without-triton", "interpreted"],
)
def test_every_part_is_walked_where_nothing_is_installed(packages: tuple[str, ...]) -> None:
    before = sorted(RESULTS.iterdir())
    printed = run_bare(packages, "--dry")
    table = table_of(printed)
    assert "FAILED" not in table
    assert "MISSED" not in printed, "figures of a dry run are judged"
    assert table.rstrip().endswith("0 parts failed")
    for part in PARTS:
        assert f"== {part}\n" in printed
        assert f"\n{part} " in table
    assert "transformers is not installed here" in printed
    assert "pytest is not here" in printed
    # a replay, a cache and graphs were there, and changed no bit
    exact = [line for line in table.splitlines() if line.startswith("exactness  dry")]
    assert len(exact) == 6
    assert all(" 1.000 " in line for line in exact), exact
    assert sorted(RESULTS.iterdir()) == before


def test_the_bare_environment_is_bare(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE.replace("runpy.run_module", "import pytest #"), "torch"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "No module named 'pytest'" in done.stderr


def test_make_passes_on_what_is_given() -> None:
    done = subprocess.run(
        [
            "make", "-n", "--no-print-directory", "bench-gpu", "DRY=1", "PYTHON=python9",
            "PARTS=kernels tiles", "ARGS=--only x",
        ],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("DRY=1 ")
    assert "python9 -m benchmarks.gpu kernels tiles --only x" in done.stdout
    assert ".venv" not in done.stdout
