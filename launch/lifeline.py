"""Children that end with their parent, whichever way it ends: killed, crashed or frozen for good.

The parent keeps one end of a pipe that nobody ever writes to, and a child reads at the other end,
in a thread: the system closes the parent's end when it is gone. Where the child was started by the
parent's main thread the system is asked to kill it as well: that reaches one which is stopped.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1


class Lifeline:
    """A parent's end: what `start` started ends when this is closed, or with this process."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def start(
        self, what: str, argument: str, environment: Mapping[str, str], keep: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start `moe_serve.launch.child` as `what`; argument: where it finds what it needs.

        keep: file descriptors that the child gets. Its stdout is this process' stderr: stdout has
        the answer, and nothing else. Ctrl-C does not reach it: it is for this process.
        """
        is_main = threading.current_thread() is threading.main_thread()
        lifeline = f"{self._read}:{os.getpid() if is_main else 0}"
        return subprocess.Popen(
            [sys.executable, "-m", "moe_serve.launch.child", what, argument, lifeline],
            env=dict(environment),
            pass_fds=(self._read, *keep),
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )

    def close(self) -> None:
        """Let go of the children: those that live end now."""
        for descriptor in (self._read, self._write):
            os.close(descriptor)


def hold(lifeline: str) -> None:
    """End this process at once when the parent is gone; `lifeline`: its last argument."""
    descriptor, _, parent = lifeline.partition(":")
    if int(parent):
        hear_of_end(signal.SIGKILL)
        if os.getppid() != int(parent):  # it was gone before that was asked for
            os._exit(1)
    threading.Thread(target=_wait, args=(int(descriptor),), name="lifeline", daemon=True).start()


def hear_of_end(number: signal.Signals) -> None:
    """Have the system send this signal when the thread that started this process has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _wait(descriptor: int) -> None:
    os.read(descriptor, 1)
    os._exit(1)
