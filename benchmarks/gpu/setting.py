"""Where a run takes place: the device, its kernels, its clock, and whether figures count."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.gpu.clock import Clock, clock_of

_Value = TypeVar("_Value")
REPEATS = 7


@dataclass(kw_only=True)
class Setting:
    """What all parts are handed.

    kernels: "triton", or, in a dry run without Triton, "reference". traces: recorded routing, .npz
    files. scratch: a folder for what is large and goes away, such as packed experts. seconds: that
    a part may take; only: of what it measures, that whose name has this.
    """

    device: torch.device
    kernels: str
    is_dry: bool
    traces: tuple[Path, ...]
    scratch: Path
    seconds: float
    only: str = ""
    num_wanted: int = 0
    num_spared: int = 0

    @cached_property
    def clock(self) -> Clock:
        return clock_of(self.device)

    @property
    def has_triton(self) -> bool:
        return self.kernels == "triton"

    @property
    def repeats(self) -> int:
        """How many samples a figure has."""
        return self.pick(REPEATS, 1)

    def pick(self, real: _Value, dry: _Value) -> _Value:
        """Return one of two sizes: that of a measurement, or that of a dry run."""
        return dry if self.is_dry else real

    def wants(self, name: str) -> bool:
        """Tell whether something is to be measured."""
        is_wanted = self.only.lower() in name.lower()
        self.num_wanted += is_wanted
        self.num_spared += not is_wanted
        return is_wanted

    @property
    def has_wanted(self) -> bool:
        """Whether something was measured, or would have been if there were anything."""
        return self.num_wanted > 0 or self.num_spared == 0


def installed(name: str) -> bool:
    """Tell whether a package can be imported here."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # where a package is forbidden
        return False


def kernels_here(is_dry: bool) -> str:
    """Return whose kernels run. Raises RuntimeError where nothing can be measured."""
    has_triton = installed("triton")
    if is_dry:
        return "triton" if has_triton else "reference"
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here; DRY=1 walks all steps without one")
    if not has_triton:
        raise RuntimeError("Triton is not installed; figures of a GPU need it")
    return "triton"


def find_setting(
    is_dry: bool, traces: tuple[Path, ...], scratch: Path, seconds: float, only: str
) -> Setting:
    """Return the setting of this machine. Raises RuntimeError where nothing can be measured."""
    return Setting(
        device=torch.device("cpu" if is_dry else "cuda"),
        kernels=kernels_here(is_dry),
        is_dry=is_dry,
        traces=traces,
        scratch=scratch,
        seconds=seconds,
        only=only,
    )


def describe(device: torch.device) -> dict[str, Any]:
    """Return the card, its driver, and the versions of what ran on it."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": _version("triton"),
        "card": None,
        "driver": None,
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": properties.L2_cache_size,
        }
    return found


def card_slug(device: torch.device) -> str:
    """Return the card's name as file names have it, such as "nvidia-h200"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "dry"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str | None:
    module = sys.modules.get(package)
    return None if module is None else str(getattr(module, "__version__", None))


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip()
