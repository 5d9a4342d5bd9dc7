"""The implementations of the kernels that this machine can run, for tests over all of them."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from moe_serve.kernels import suite
from moe_serve.kernels.gpu.numerics import Numerics
from moe_serve.kernels.native import loader
from moe_serve.kernels.sampling.base import Sampling


def _names() -> tuple[str, ...]:
    try:
        isas = loader.supported_isas(loader.open_library())
    except loader.NotBuilt:
        return ("reference",)
    return ("reference", *(f"cpu-{isa}" for isa in isas))


# interpreted here, or on a GPU
TRITON = ("triton-exact", "triton-fast") if importlib.util.find_spec("triton") else ()
INTERPRETED = () if torch.cuda.is_available() else TRITON
IMPLEMENTATIONS = (*_names(), *TRITON)
# a whole model takes minutes where each kernel is interpreted: see tests/test_triton_engine.py
FOR_MODELS = tuple(name for name in IMPLEMENTATIONS if name not in INTERPRETED)
NATIVE = tuple(name for name in IMPLEMENTATIONS if name.startswith("cpu-"))
# of which a row's bits depend on that row alone
EXACT = tuple(name for name in IMPLEMENTATIONS if name != "triton-fast")

EACH = pytest.mark.parametrize("name", IMPLEMENTATIONS)
EACH_FOR_MODELS = pytest.mark.parametrize("name", FOR_MODELS)
EACH_EXACT = pytest.mark.parametrize("name", EXACT)
EACH_ON_A_GPU = pytest.mark.parametrize("name", TRITON[:1])
# without a library these tests are skipped; test_native_is_built.py says where that is an error
EACH_NATIVE = pytest.mark.parametrize("name", NATIVE)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def each_exact_with(
    argument: str, values: Sequence[Any], interpreted: Sequence[Any]
) -> pytest.MarkDecorator:
    """Parametrise over EXACT and an argument's values; what is interpreted has only some."""
    pairs = [
        (name, value)
        for name in EXACT
        for value in (interpreted if name in INTERPRETED else values)
    ]
    return pytest.mark.parametrize(("name", argument), pairs)


def is_interpreted(sampling: Sampling) -> bool:
    """Tell whether these are kernels that are interpreted, and so are slow."""
    return any(sampling is kernels(name).sampling for name in INTERPRETED)


@functools.cache
def kernels(name: str) -> suite.Kernels:
    """Return the kernels of "reference", "cpu-<instruction set>" or "triton-<numerics>"."""
    kind, _, way = name.partition("-")
    if kind == "triton":
        return suite.load(kind, numerics=cast(Numerics, way))
    return suite.load(kind, way or "auto")
