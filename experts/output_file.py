"""Where files that a run leaves go: refused before the run, written whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe_serve.errors import TraceError


def output_path(path: Path) -> Path:
    """Return the file that `path` names, links followed.

    Raises TraceError where no file can be put there: its folder is missing or not writable, or what
    is there is no regular file.
    """
    try:
        target = Path(os.path.realpath(path))
        if not path.name:
            raise TraceError(f"{str(path)!r} names no file; give the name of one")
        if os.path.lexists(target) and not stat.S_ISREG(target.stat().st_mode):
            raise TraceError(f"{path}: is there and is no regular file; give another name")
        if not target.parent.is_dir():
            raise TraceError(f"{path}: its folder is not there; make it first")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise TraceError(f"{path}: its folder cannot be written to; give another one")
    except OSError as error:
        raise TraceError(f"{path}: cannot be written ({error.strerror})") from error
    return target


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` at the end, unless something is raised.

    Keeps the mode of what was there. Raises TraceError where it cannot be written.
    """
    target = output_path(path)
    part = None
    try:
        descriptor, part = tempfile.mkstemp(prefix=f"{target.name}.part-", dir=target.parent)
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(part, mode)
        os.replace(part, target)
        part = None
    except OSError as error:
        raise TraceError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
