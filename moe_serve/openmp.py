"""How threads of OpenMP and of OpenBLAS wait: settled before they are loaded, or not at all."""

from __future__ import annotations

import os
import sys

# of the GNU library, which torch's wheels bring: how often a waiting thread looks before it sleeps
_SPIN = "GOMP_SPINCOUNT"
_SPIN_COUNT = "2000"
_WAIT_POLICY = "OMP_WAIT_POLICY"
# of numpy's wheels: what numpy multiplies here is small, and its threads would spin afterwards
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


def wait_shortly() -> bool:
    """Let waiting threads sleep soon, where the environment does not say how they wait.

    By default they spin for milliseconds, which on a machine with other work keeps a core from the
    very thread that is waited for: a decode took 1.8 times as long. Where the cores are free it
    makes no difference (docs/log.md). No use once torch is loaded. Returns whether it was done.
    numpy's products get one thread, if numpy is not loaded either.
    """
    if "numpy" not in sys.modules:
        os.environ.setdefault(_BLAS_THREADS, "1")
    if "torch" in sys.modules or _SPIN in os.environ or _WAIT_POLICY in os.environ:
        return False
    os.environ[_SPIN] = _SPIN_COUNT
    return True
