"""How the native library is built: what pyproject.toml lists, and what comes out."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import torch

from moe_serve.kernels.native import loader
from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.machine import measure_bandwidth
from tests.test_wheel import needs_compiler

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "moe_serve" / "kernels" / "native"
MIB = 2**20


@pytest.fixture
def built() -> Path:
    """The library of this tree."""
    path = loader.built_path()
    if path is None:
        pytest.skip("the native library is not built")
    return path


@pytest.fixture
def native(built: Path) -> Native:
    return loader.load("plain", built)


@pytest.mark.parametrize(("key", "suffix"), [("sources", ".cpp"), ("depends", ".h")])
def test_pyproject_lists_every_source(key: str, suffix: str) -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    (extension,) = tool["setuptools"]["ext-modules"]
    found = [path.relative_to(ROOT).as_posix() for path in sorted(FOLDER.glob(f"*{suffix}"))]
    assert extension[key] == found


@needs_compiler
def test_the_install_built_the_library() -> None:
    try:
        importlib.metadata.version("moe-serve")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the tree alone")
    assert loader.load().isa in loader.ISAS


def test_the_library_brings_no_threads_of_its_own(built: Path) -> None:
    assert b"GOMP_parallel" in built.read_bytes()
    assert b"libgomp.so" not in built.read_bytes()


def test_every_instruction_set_has_every_function(built: Path) -> None:
    symbols = re.findall(rb"\bms_(?!has_)\w+", built.read_bytes())
    names = {
        isa: {s.removesuffix(isa.encode()) for s in symbols if s.endswith(isa.encode())}
        for isa in loader.ISAS
    }
    assert b"ms_linear_" in names["plain"]
    if names["avx512_bf16"]:  # built for another processor family otherwise
        assert names["avx512_bf16"] == names["plain"]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_all_memory_is_read_and_copied(native: Native, threads: int) -> None:
    words = torch.randint(-(2**62), 2**62, (5 * MIB // 8,))
    copied = torch.zeros(words.numel() + 8, dtype=torch.int64)
    total = ctypes.c_uint64()
    read_seconds = native.machine_function("read_seconds", "iplp", "d")
    copy_seconds = native.machine_function("copy_seconds", "ippl", "d")
    assert read_seconds(threads, words.data_ptr(), words.nbytes, ctypes.addressof(total)) > 0
    assert total.value == words.sum().item() % 2**64
    assert copy_seconds(threads, words.data_ptr(), copied.data_ptr(), words.nbytes) > 0
    assert torch.equal(copied[:-8], words)
    assert not copied[-8:].any()


@pytest.mark.parametrize("measured_by", ["native", "torch"])
def test_bandwidth_is_measured(measured_by: str, request: pytest.FixtureRequest) -> None:
    native = request.getfixturevalue("native") if measured_by == "native" else None
    found = measure_bandwidth(native, 21 * MIB, duration_s=0)
    assert found.measured_by == measured_by
    assert found.num_bytes == 16 * MIB
    # slower than any memory in use, faster than any cache
    assert 1e7 < found.copy_bytes_s < 1e13
    assert 1e7 < found.read_bytes_s < 1e13
