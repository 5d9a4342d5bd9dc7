"""Where a peer's own Python is: what it needs and what this project needs do not mix.

    <cache>/envs/<system>/bin/python

`benchmarks.peers.install` makes it; a system without one runs in the interpreter of the driver.
"""

from __future__ import annotations

import sys
from pathlib import Path


def environment(system: str, cache: Path) -> Path:
    """Return the folder of a system's virtual environment, whether it is there or not."""
    return cache / "envs" / system


def python_of(folder: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return folder / "bin" / "python"


def interpreter(system: str, cache: Path) -> Path:
    """Return what runs a system: the Python of its own environment, or else this one."""
    own = python_of(environment(system, cache))
    return own if own.is_file() else Path(sys.executable)
