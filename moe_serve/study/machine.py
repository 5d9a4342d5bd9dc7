"""The machine that a plan is for: its sizes and rates, each measured here, given, or assumed.

What a file gives is taken as it is. Of the rest, what a process alone can measure is measured here;
what needs other machines is assumed, as `ASSUMED` has it. Every value keeps its source.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_serve.config import EngineConfig
from moe_serve.doctor import examine
from moe_serve.engine.expert_parts import default_store_folder
from moe_serve.engine.memory import GIB
from moe_serve.errors import ConfigError, nearest

_MATRIX_SIZE = 1024
_MATRIX_S = 0.2
_DISK_BYTES = 64 << 20
_DISK_PIECE_BYTES = 1 << 20
_SLOWEST = 1e-3


@dataclass(frozen=True, slots=True)
class Quantity:
    """One value of a machine: its unit, and what it may be."""

    unit: str
    low: float
    high: float
    is_whole: bool = False


QUANTITIES: Mapping[str, Quantity] = {
    "memory_gb": Quantity("GiB that may be taken, a machine", _SLOWEST, 2**20),
    "cores": Quantity("cores, a machine", 1, 2**16, True),
    "memory_gb_per_s": Quantity("GB/s read from memory, a machine", _SLOWEST, 1e6),
    "gflop_per_s": Quantity("GFLOP/s of matrix products, a machine", _SLOWEST, 1e9),
    "disk_gb_per_s": Quantity("GB/s at which missing experts come in, a machine", _SLOWEST, 1e5),
    "network_gb_per_s": Quantity("GB/s that one rank sends to others", _SLOWEST, 1e5),
    "latency_us": Quantity("us of one collective", 0, 1e7),
    "step_us": Quantity("us of a step beside all that (the interpreter, sampling)", 0, 1e7),
    "num_machines": Quantity("machines, all alike", 1, 1024, True),
}
# network and latency: gloo between two processes of one machine, calls of 1 MB and of 1 KB; a step:
# what a decode step of one request takes outside kernels (README, Figures)
ASSUMED: Mapping[str, float] = {
    "disk_gb_per_s": 1.0,
    "network_gb_per_s": 3.5,
    "latency_us": 80.0,
    "step_us": 900.0,
    "num_machines": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """See QUANTITIES for the units. sources: where each value is from, by name."""

    memory_gb: float
    cores: int
    memory_gb_per_s: float
    gflop_per_s: float
    disk_gb_per_s: float
    network_gb_per_s: float
    latency_us: float
    step_us: float
    num_machines: int
    sources: Mapping[str, str]

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * GIB)

    def values(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in QUANTITIES}


def find_machine(path: Path | None, config: EngineConfig, dtype: torch.dtype) -> Machine:
    """Return the machine of a file, and for what the file does not say, this one.

    dtype: of the matrix products. Takes about two seconds, none where the file says all. Raises
    ConfigError for a file that is no machine.
    """
    given = {} if path is None else read_machine(path)
    values, sources = dict(given), dict.fromkeys(given, "given")
    here = {"memory_gb", "cores", "memory_gb_per_s"} - set(given)
    if here:
        report = examine(config.runtime)
        memory = report["memory"]
        found = {
            "memory_gb": memory["available_bytes"] / GIB,
            "cores": report["cpu"]["cores"],
            "memory_gb_per_s": memory["read_bytes_s"] / 1e9,
        }
        values |= {name: found[name] for name in here}
        sources |= dict.fromkeys(here, "measured")
    if "gflop_per_s" not in given:
        values["gflop_per_s"] = _measured_gflop_per_s(dtype)
        sources["gflop_per_s"] = f"measured, {str(dtype).removeprefix('torch.')}"
    if "disk_gb_per_s" not in given:
        rate = measured_disk_gb_per_s(_existing(config))
        if rate is not None:
            values["disk_gb_per_s"] = rate
            sources["disk_gb_per_s"] = f"measured, one reader of {_DISK_BYTES >> 20} MiB"
    for name, value in ASSUMED.items():
        if name not in values:
            values[name] = value
            sources[name] = "assumed"
    whole = {name: int(values[name]) for name, kind in QUANTITIES.items() if kind.is_whole}
    return Machine(**{**values, **whole}, sources=sources)  # type: ignore[arg-type]


def read_machine(path: Path) -> dict[str, float]:
    """Return what a JSON file says of a machine, by QUANTITIES. Raises ConfigError."""
    try:
        given = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a machine ({error})") from error
    if not isinstance(given, dict):
        raise ConfigError(
            f"{path}: a machine is an object of some of {', '.join(QUANTITIES)}; what it leaves "
            "out is measured here"
        )
    for name, value in given.items():
        kind = QUANTITIES.get(name)
        if kind is None:
            raise ConfigError(
                f"{path}: no {name!r} of a machine{nearest(name, QUANTITIES)} "
                f"(there are: {', '.join(QUANTITIES)})"
            )
        accepted = int if kind.is_whole else (int, float)
        is_number = isinstance(value, accepted) and not isinstance(value, bool)
        if not is_number or not kind.low <= value <= kind.high:
            raise ConfigError(
                f"{path}: {name} is {value!r}; give a {'whole ' if kind.is_whole else ''}number "
                f"from {kind.low:g} to {kind.high:g} ({kind.unit}), or leave it out"
            )
    return given


def _measured_gflop_per_s(dtype: torch.dtype) -> float:
    """Return what torch's product of two matrices reaches, in GFLOP/s; the best of some."""
    matrix = torch.ones(_MATRIX_SIZE, _MATRIX_SIZE, dtype=dtype)
    best_s = math.inf
    deadline_s = time.perf_counter() + _MATRIX_S
    while best_s == math.inf or time.perf_counter() < deadline_s:
        start_s = time.perf_counter()
        torch.mm(matrix, matrix)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * _MATRIX_SIZE**3 / best_s / 1e9


def _existing(config: EngineConfig) -> Path:
    """Return the folder of packed experts, or what there is of its path."""
    given = config.experts.expert_store
    folder = (default_store_folder() if given is None else Path(given)).absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def measured_disk_gb_per_s(folder: Path) -> float | None:
    """Return the rate at which one reader gets a new file in `folder`, past the page cache.

    The file is gone afterwards. None where it cannot be written there, or the page cache cannot be
    passed: then nothing is known.
    """
    piece = mmap.mmap(-1, _DISK_PIECE_BYTES)  # aligned, as direct reads need it
    piece.write(os.urandom(_DISK_PIECE_BYTES))
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="moe-serve-plan-") as file:
            for _ in range(_DISK_BYTES // _DISK_PIECE_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            descriptor = os.open(file.name, os.O_RDONLY | flag)
            try:
                start_s = time.perf_counter()
                for offset in range(0, _DISK_BYTES, _DISK_PIECE_BYTES):
                    os.preadv(descriptor, [piece], offset)
                return _DISK_BYTES / (time.perf_counter() - start_s) / 1e9
            finally:
                os.close(descriptor)
    except OSError:  # no room, no right, or a file system in memory
        return None
