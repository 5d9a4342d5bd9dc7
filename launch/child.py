"""`python -m moe_serve.launch.child WHAT ARGUMENT LIFELINE`: a process that ends with its parent.

What it is to be is imported after it holds the lifeline, since that takes seconds.
"""

from __future__ import annotations

import importlib
import sys

from moe_serve.launch.lifeline import hold

MODULES = {
    "rank": "moe_serve.launch.rank",
    "front_end": "moe_serve.server.front_end",
    "host": "moe_serve.launch.host_process",
}


def main(what: str, argument: str, lifeline: str) -> int:
    """Hold the lifeline, and run WHAT's `main` on its argument; return the exit code."""
    hold(lifeline)
    code: int = importlib.import_module(MODULES[what]).main(argument)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
