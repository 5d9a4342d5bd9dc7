"""Free memory goes back to the system: when nothing is to be done, or after a while."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from moe_serve.server.heap import Heap

HAS_TRIM = hasattr(ctypes.CDLL(None), "malloc_trim")

# blocks as of bodies and answers, every second one kept: no hole is at the top
_HOLES = """
import resource
from moe_serve.server.heap import Heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

heap = Heap()
blocks = [bytes(20_000) for _ in range(4000)]
full = resident()
del blocks[::2]
before = resident()
heap.tick(1)
assert heap.tick(0)
print(full - before, before - resident())
"""


@pytest.mark.skipif(not HAS_TRIM, reason="the C library has no malloc_trim")
def test_holes_are_given_back() -> None:
    run = subprocess.run([sys.executable, "-c", _HOLES], capture_output=True, text=True, check=True)
    by_itself, given_back = map(int, run.stdout.split())
    assert by_itself < 2_000_000
    # of 40 MB of holes, all but the pages that they share with what was kept
    assert given_back > 20_000_000


@pytest.mark.skipif(not HAS_TRIM, reason="the C library has no malloc_trim")
def test_it_is_done_once_after_work_and_at_most_once_a_minute_in_it() -> None:
    now_s = 0.0
    heap = Heap(lambda: now_s)
    assert not heap.tick(0), "nothing was done yet"
    done = []
    for second in range(1, 200):
        now_s = float(second)
        if heap.tick(3 if second <= 150 else 0):
            done.append(second)
    assert done == [60, 120, 151]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap = Heap()
    assert not heap.tick(1)
    assert not heap.tick(0)
