"""What runs here, and on what: kernels, instruction sets, cores, memory and its speed, devices.

It loads no model. The report is plain data, the form of `moe-serve doctor --json`; `lines_of` is
the same for a reader.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import moe_serve
from moe_serve.config import RuntimeConfig
from moe_serve.engine.memory import available_bytes
from moe_serve.kernels import suite
from moe_serve.kernels.native import loader
from moe_serve.kernels.native.machine import measure_bandwidth
from moe_serve.kernels.suite import Kernels

SCHEMA = 1
PACKAGES = ("torch", "numpy", "msgspec", "safetensors", "tokenizers", "transformers", "triton")

_MIB = 2**20
_GIB = 2**30
_MOST_MEASURED_BYTES = 512 * _MIB


def examine(config: RuntimeConfig) -> dict[str, Any]:
    """Return what an engine with these options would run on; takes about a second.

    Sets torch's number of threads when the options do. Raises ConfigError for kernels or an
    instruction set that cannot be had.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return report_of(suite.load(config.kernels, config.isa, config.numerics), _opened_library())


def _opened_library() -> loader.Native | None:
    """Return the native library, also where the options choose other kernels."""
    try:
        return loader.load()
    except loader.NotBuilt:  # which the kernels give as their reason
        return None


def report_of(kernels: Kernels, native: loader.Native | None) -> dict[str, Any]:
    """Describe kernels and machine; native, if there is one, measures the memory."""
    available = available_bytes()
    bandwidth = measure_bandwidth(native, min(_MOST_MEASURED_BYTES, available // 8))
    return {
        "schema": SCHEMA,
        "version": moe_serve.__version__,
        "python": platform.python_version(),
        "packages": {name: _installed_version(name) for name in PACKAGES},
        "kernels": {
            "name": kernels.name,
            "reason": kernels.reason,
            "numerics_id": kernels.numerics_id,
            "implementations": implementations(kernels),
        },
        "isa": {
            "supported": list(loader.supported_isas(loader.open_library())) if native else [],
            "chosen": kernels.isa,
        },
        "cpu": {
            "model": _processor(),
            "cores": _num_cores(),
            "threads": torch.get_num_threads(),
        },
        "memory": {
            "total_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "available_bytes": available,
            "read_bytes_s": round(bandwidth.read_bytes_s),
            "copy_bytes_s": round(bandwidth.copy_bytes_s),
            "measured_bytes": bandwidth.num_bytes,
            "measured_by": bandwidth.measured_by,
        },
        "gpus": _gpus(),
    }


def implementations(kernels: Kernels) -> dict[str, str]:
    """Name what runs each operation, a folder of kernels/: the file that its functions are in."""
    found: dict[str, set[str]] = {}
    for field in dataclasses.fields(kernels):
        part = getattr(kernels, field.name)
        module = part.__name__ if isinstance(part, ModuleType) else getattr(part, "__module__", "")
        if not module.startswith("moe_serve.kernels."):
            continue  # a name or a number
        _, operation, file = module.rsplit(".", 2)
        if operation == "gpu":
            continue  # a plan of what is to be done
        found.setdefault(operation, set()).add(f"{file} ({kernels.isa})" if file == "cpu" else file)
    return {operation: ", ".join(sorted(files)) for operation, files in found.items()}


def lines_of(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a report's lines for a reader."""
    packages = [f"{name} {version}" for name, version in report["packages"].items() if version]
    yield f"moe-serve {report['version']}, Python {report['python']}, {', '.join(packages)}"
    kernels, isa, cpu, memory = (report[part] for part in ("kernels", "isa", "cpu", "memory"))
    yield f"kernels     {kernels['name']}: {kernels['reason']}"
    for operation, implementation in kernels["implementations"].items():
        yield f"  {operation:20} {implementation}"
    yield f"numerics    {kernels['numerics_id']}"
    supported = ", ".join(isa["supported"]) or "not known without the native library"
    yield f"isa         {supported}; chosen: {isa['chosen'] or 'what torch takes'}"
    yield f"processor   {cpu['model']}; cores: {cpu['cores']}; threads: {cpu['threads']}"
    total, available = memory["total_bytes"] / _GIB, memory["available_bytes"] / _GIB
    yield f"memory      {total:.1f} GiB, {available:.1f} GiB of it available"
    read, copy = memory["read_bytes_s"] / 1e9, memory["copy_bytes_s"] / 1e9
    how = f"{memory['measured_by']}, over {memory['measured_bytes'] / _MIB:.0f} MiB"
    yield f"bandwidth   read {read:.1f} GB/s, copy {copy:.1f} GB/s ({how})"
    for gpu in report["gpus"]:
        yield f"gpu         {gpu['name']}, {gpu['memory_bytes'] / _GIB:.1f} GiB"
    if not report["gpus"]:
        yield "gpu         none that torch can use"


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]
