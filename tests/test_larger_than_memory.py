"""A model whose experts exceed what the system lets the process take runs within its budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_serve.kernels.native.memory import allocate
from tests.larger_than_memory import EXPERT_BYTES, KEPT_BYTES, MIB, OTHER_BYTES


def _run(repository: Path, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.larger_than_memory", str(folder), json.dumps(options)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


def _counts_direct_reads(folder: Path) -> bool:
    """Return whether the system counts what is read directly from a file in `folder`."""
    path = folder / "probe"
    path.write_bytes(bytes(MIB))
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
    before = _read_bytes()
    try:
        os.preadv(descriptor, [allocate(MIB).numpy().data], 0)
    finally:
        os.close(descriptor)
    return _read_bytes() - before >= MIB


def _read_bytes() -> int:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system does not tell peaks of memory"
)
@pytest.mark.parametrize(
    "options", [{"expert_cache_gb": KEPT_BYTES / 2**30}, {}], ids=["gib", "auto"]
)
def test_it_runs_in_the_memory_given_and_reads_what_it_says(
    repository: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    assert EXPERT_BYTES > 1.9 * (KEPT_BYTES + OTHER_BYTES), "it could be held after all"
    if not _counts_direct_reads(tmp_path):
        pytest.skip(f"{tmp_path}: the system does not count direct reads there (a tmpfs?)")
    done = _run(repository, tmp_path, **options)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    most = KEPT_BYTES + (16 * MIB if options else OTHER_BYTES)
    assert 0.9 * KEPT_BYTES < told["planned"] < most
    assert told["growth"] <= 1.1 * told["planned"], "it packed, loaded and served"
    assert told["fetched"] > EXPERT_BYTES / 3
    assert told["read"] >= 0.95 * told["fetched"]


def test_a_budget_above_the_limit_is_refused_with_a_way_out(
    repository: Path, tmp_path: Path
) -> None:
    done = _run(repository, tmp_path, expert_cache_gb=0.25)
    last = done.stderr.splitlines()[-1]
    assert "CapacityError: " in last, done.stderr
    assert "expert_cache_gb" in last, "what is to be lowered"
