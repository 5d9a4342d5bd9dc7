"""Small files of named arrays that a run leaves to later ones: safetensors, of a kind each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from moe_serve.errors import TraceError
from moe_serve.experts.output_file import whole_file

Array = np.ndarray[Any, Any]
_KIND = "moe_serve"


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Return a file's arrays, and what else it says. Raises TraceError for a file of other kind."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            told = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise TraceError(f"{path}: not a {kind} ({error})") from error
    if told.pop(_KIND, None) != kind:
        raise TraceError(f"{path}: not a {kind} of this version; give another file")
    return arrays, told


def write_arrays(
    path: Path, kind: str, arrays: Mapping[str, Array], told: Mapping[str, str]
) -> None:
    """Write a file, which appears whole or not at all. Raises TraceError where it cannot be."""
    data = safetensors.numpy.save(
        {name: np.asarray(array, order="C") for name, array in arrays.items()},
        {_KIND: kind, **told},
    )
    with whole_file(path) as file:
        file.write(data)
