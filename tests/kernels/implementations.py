"""The implementations of the kernels that this machine can run, for tests over all of them."""

from __future__ import annotations

import functools

import pytest
import torch

from moe_serve.kernels import suite
from moe_serve.kernels.native import loader


def _names() -> tuple[str, ...]:
    try:
        isas = loader.supported_isas(loader.open_library())
    except loader.NotBuilt:
        return ("reference",)
    return ("reference", *(f"cpu-{isa}" for isa in isas))


IMPLEMENTATIONS = _names()
NATIVE = tuple(name for name in IMPLEMENTATIONS if name != "reference")

EACH = pytest.mark.parametrize("name", IMPLEMENTATIONS)
# without a library these tests are skipped; test_native_is_built.py says where that is an error
EACH_NATIVE = pytest.mark.parametrize("name", NATIVE)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@functools.cache
def kernels(name: str) -> suite.Kernels:
    """Return the kernels of "reference" or "cpu-<instruction set>"."""
    kind, _, isa = name.partition("-")
    return suite.load(kind, isa or "auto")
