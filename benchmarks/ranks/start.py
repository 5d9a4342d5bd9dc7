"""Starts commands as ranks, with the environment that torchrun would give them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def environment(rank: int, size: int, port: int, here: int | None = None) -> dict[str, str]:
    """Return what torchrun would tell a rank; here: ranks on its node."""
    here = here or size
    return {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % here),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(size: int, command: list[str], here: int | None = None) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment(rank, size, port, here),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finished(
    processes: list[subprocess.Popen[str]], limit_s: float = 300
) -> list[tuple[int, str, str]]:
    """Return code, stdout and stderr of each; none outlives the test."""
    try:
        told = [process.communicate(timeout=limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, out, err) for process, (out, err) in zip(processes, told, strict=True)
    ]
