"""The C compiler with which Triton builds what launches its kernels: whether there is one.

Looked for as Triton 3.6 and 3.7 do (triton/runtime/build.py), which fail at the first kernel, in
the middle of a step.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def why_no_launchers() -> str | None:
    """Return what Triton lacks to build launchers, and what to do; None where it lacks nothing."""
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"CC is {named!r}, which is no program; name a C compiler in CC, or unset it"
    if named is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "there is no C compiler; install gcc or clang, or name one in CC"
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's, whose headers are where they are without it
        scheme = "posix_prefix"
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if not header.is_file():
        return f"there is no {header}; install Python's headers (python3-dev or python3-devel)"
    return None
