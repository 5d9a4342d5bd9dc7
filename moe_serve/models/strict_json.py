"""Read a JSON object from a file that nobody vouches for.

Stricter than `json`: one object, no name twice, no NaN or Infinity, no number that a float64 or a
few words of memory cannot hold. Whatever is wrong is a CheckpointError that names the file.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, NoReturn

from moe_serve.errors import CheckpointError

MAX_FILE_BYTES = 64 * 2**20
MAX_DIGITS = 40

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxlong = _shortener.maxother = 60
_shortener.maxlevel = 2


def shown(value: object) -> str:
    """Return `value` as an error message may quote it: as Python writes it, cut to a line."""
    return _shortener.repr(value)


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in the file at `path`, of at most MAX_FILE_BYTES."""
    try:
        found = path.stat()  # before the file is opened: opening a pipe would wait for ever
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{path}: {found.st_size} bytes; a JSON file here has at most {MAX_FILE_BYTES}"
            )
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse `data` as one JSON object; `where` begins every error message."""

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise CheckpointError(
                f"{where}: an integer of {len(digits)} digits ({digits[:12]}...); "
                f"at most {MAX_DIGITS} digits are read"
            )
        return int(digits)

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise CheckpointError(f"{where}: the number {shown(text)} does not fit a float64")
        return value

    def constant(name: str) -> NoReturn:
        raise CheckpointError(f"{where}: holds {name}, which is not JSON; write a number or null")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                raise CheckpointError(f"{where}: the name {shown(name)} is there twice; keep one")
            seen[name] = value
        return seen

    try:
        value = json.loads(
            data.decode("utf-8-sig"),
            parse_int=integer,
            parse_float=number,
            parse_constant=constant,
            object_pairs_hook=mapping,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: nested too deeply to be read") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: holds {shown(value)}; it must be a JSON object")
    return value


def unreadable(path: str | os.PathLike[str], error: OSError) -> CheckpointError:
    """Return the CheckpointError that says why the system would not read `path`."""
    return CheckpointError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}")
