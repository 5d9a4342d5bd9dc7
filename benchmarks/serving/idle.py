"""What a server has under way, and how long it takes until that is nothing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import psutil

from benchmarks.serving.served import Served

# between two looks that must agree: the engine's part is told with some delay
_AGAIN_S = 0.4


@dataclass(frozen=True)
class Load:
    """What is under way. kv_blocks: held by sequences; connections: without the one that asked."""

    running: int
    waiting: int
    queue_tokens: int
    kv_blocks: int
    connections: int

    @property
    def is_none(self) -> bool:
        return self == Load(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Use:
    """What one process has of its machine.

    own_bytes: resident, without the pages of files: those the system takes back and reads again as
    it likes, so that they tell nothing of what the process keeps.
    """

    own_bytes: int
    descriptors: int
    threads: int


def load_of(server: Served) -> Load:
    """Return what a server has under way. Raises RuntimeError where it does not say."""
    status, data = server.get("/dashboard/data", 30.0)
    if status != 200:
        raise RuntimeError(f"the server does not say what it does: {status}")
    told = json.loads(data)
    requests = told["requests"]
    return Load(
        running=requests["num_running"],
        waiting=requests["num_waiting"],
        queue_tokens=requests["queue_tokens"],
        kv_blocks=sum(g["num_blocks"] - g["num_free"] - g["num_cached"] for g in told["kv"]),
        connections=requests["open_connections"] - 1,
    )


def wait_until_idle(server: Served, limit_s: float = 30.0) -> float:
    """Return after how many seconds nothing was under way, and it stayed so. Raises RuntimeError"""
    begun_s = time.monotonic()
    idle_s: float | None = None
    while True:
        load, now_s = load_of(server), time.monotonic() - begun_s
        if not load.is_none:
            idle_s = None
        elif idle_s is None:
            idle_s = now_s
        elif now_s - idle_s > _AGAIN_S:
            return idle_s
        if now_s > limit_s:
            raise RuntimeError(f"after {limit_s:.0f} s there is still {load}")
        time.sleep(0.01)


def use_of(server: Served) -> dict[str, Use]:
    """Return what each process of a server uses."""
    found = {}
    for name, pid in server.processes().items():
        process = psutil.Process(pid)
        with process.oneshot():
            memory = process.memory_info()
            own_bytes = memory.rss - memory.shared
            found[name] = Use(own_bytes, process.num_fds(), process.num_threads())
    return found


def growth(before: dict[str, Use], after: dict[str, Use]) -> int:
    """Return by how many bytes the processes of a server have grown together."""
    return sum(use.own_bytes for use in after.values()) - sum(
        use.own_bytes for use in before.values()
    )
