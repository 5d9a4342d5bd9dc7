"""Children end with their parent: killed, closed, and also where they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

# a parent that starts one child, which holds the lifeline and sleeps, and says its pid
PARENT = """
import os, subprocess, sys, threading, time
from moe_serve.launch.lifeline import Lifeline
line = Lifeline()
child = (
    "import sys, time; from moe_serve.launch.lifeline import hold; hold(sys.argv[1]); "
    "print('held', flush=True); time.sleep(60)"
)
def start():
    place = f"{line._read}:{os.getpid() if sys.argv[1] == 'main' else 0}"
    one = subprocess.Popen([sys.executable, "-c", child, place], pass_fds=(line._read,),
                           stdout=subprocess.PIPE, text=True)
    assert one.stdout.readline() == "held\\n"
    print(one.pid, flush=True)
if sys.argv[1] == "main":
    start()
else:
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
sys.stdin.readline()
line.close()
time.sleep(60)
"""


def wait_until_gone(pid: int) -> bool:
    end_s = time.monotonic() + 5
    while time.monotonic() < end_s:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("thread", ["main", "other"])
@pytest.mark.parametrize("how", ["killed", "closed"])
def test_a_child_ends_with_its_parent(thread: str, how: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, thread],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdin is not None
    assert parent.stdout is not None
    try:
        child = int(parent.stdout.readline())
        time.sleep(0.1)
        assert psutil.pid_exists(child)  # also after the thread that started it has ended
        if how == "killed":
            if thread == "main":
                os.kill(child, signal.SIGSTOP)  # the system kills it all the same
            parent.kill()
        else:
            parent.stdin.write("\n")
            parent.stdin.flush()
        assert wait_until_gone(child)
    finally:
        parent.kill()
        parent.communicate()
