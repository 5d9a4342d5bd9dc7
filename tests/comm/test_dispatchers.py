"""Dispatchers between processes: bit for bit what one process gives, whatever the placement."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.implementations import INTERPRETED


def run_ranks(
    repository: Path,
    size: int,
    cases: int,
    kernels: str = "reference auto",
    most_tokens: int = 70,
    device: str = "cpu",
) -> list[dict[str, int]]:
    """Run tests.comm.worker on `size` processes; return what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "STORE_PORT": str(port),
        "CASES": str(cases),
        "KERNELS": kernels,
        "DEVICE": device,
        "MOST_TOKENS": str(most_tokens),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.comm.worker"],
            cwd=repository,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        printed = [rank.communicate(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, err) in zip(ranks, printed, strict=True):
        assert rank.returncode == 0, err[-3000:]
    return [json.loads(out) for out, _ in printed]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_dispatcher_gives_the_bits_of_one_process(repository: Path, size: int) -> None:
    """Random placements with replicas, ranks without tokens, steps beyond static's slots."""
    counted = run_ranks(repository, size, cases=25)
    assert len({one["collectives"] for one in counted}) == 1
    assert all((one["bytes"] > 0) == (size > 1) for one in counted)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and no GPU")
def test_every_dispatcher_gives_the_bits_of_one_process_by_triton(repository: Path) -> None:
    """Interpreted; where inboxes have room for more pairs than there are."""
    counted = run_ranks(repository, 2, cases=1, kernels="triton", most_tokens=5)
    assert len({one["collectives"] for one in counted}) == 1


@pytest.mark.gpu
def test_every_dispatcher_on_a_gpu_with_one_rank(repository: Path) -> None:
    """Over NCCL, with replays of a graph that holds a layer through static."""
    (counted,) = run_ranks(repository, 1, cases=25, kernels="triton", device="cuda")
    assert counted["bytes"] == 0
