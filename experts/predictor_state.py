"""Files of what a predictor learned, with the predictor's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_serve.errors import TraceError
from moe_serve.experts.array_file import Array, read_arrays, write_arrays

_KIND = "predictor's file 1"


def read_state(path: Path, predictor: str) -> dict[str, Array]:
    """Read what `predictor` learned. Raises TraceError for another file, or another predictor's."""
    arrays, told = read_arrays(path, _KIND)
    found = told.get("predictor")
    if found != predictor:
        raise TraceError(
            f"{path}: holds what {found} learned, but the predictor is {predictor}; give another "
            f"file, or predictor {found}"
        )
    return arrays


def write_state(path: Path, predictor: str, state: Mapping[str, Array]) -> None:
    """Write what `predictor` learned. Raises TraceError."""
    write_arrays(path, _KIND, state, {"predictor": predictor})
