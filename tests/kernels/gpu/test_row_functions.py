"""What kernels on rows share: roundings, an order of floats, addresses."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from moe_serve.kernels.gpu.triton import aligned, ordered, rounded, widened

# isort: split
import triton
import triton.language as tl

from tests.kernels.row_independence import same_bits

EDGES = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, -3.4e38, torch.inf, -torch.inf]


@triton.jit  # type: ignore[untyped-decorator]
def _order(values: Any, keys: Any, COUNT: tl.constexpr) -> None:
    at = tl.arange(0, COUNT)
    tl.store(keys + at, ordered(tl.load(values + at)))


@triton.jit  # type: ignore[untyped-decorator]
def _round(values: Any, short: Any, wide: Any, COUNT: tl.constexpr) -> None:
    at = tl.arange(0, COUNT)
    kept = rounded(tl.load(values + at), short.dtype.element_ty)
    tl.store(short + at, kept)
    tl.store(wide + at, widened(kept))


def test_integers_are_in_the_order_of_floats() -> None:
    values = torch.tensor([*EDGES, torch.nan, -torch.nan])
    values = torch.cat([values, torch.randn(20)])
    keys = torch.empty(32, dtype=torch.int32)
    _order[(1,)](values, keys, 32)
    assert keys[10:12].tolist() == [2**31 - 1] * 2  # above all
    assert keys.min() > -(2**31)
    finite, order = torch.cat([values[:10], values[12:]]), torch.cat([keys[:10], keys[12:]])
    assert torch.equal(finite[:, None] < finite, order[:, None] < order)
    assert torch.equal(finite[:, None] == finite, order[:, None] == order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_rounded_to_the_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0])
    values = torch.cat([torch.tensor(EDGES), ties, torch.randn(49)])
    if dtype == torch.float16:
        values = values.clamp(-6e4, 6e4)
    short, wide = torch.empty(64, dtype=dtype), torch.empty(64)
    _round[(1,)](values, short, wide, 64)
    assert same_bits(short, values.to(dtype))
    assert same_bits(wide, values.to(dtype).float())
    nan = torch.full((64,), torch.nan)
    _round[(1,)](nan, short, wide, 64)
    assert bool(short.isnan().all())
    assert bool(wide.isnan().all())


def test_what_lies_askew_is_copied() -> None:
    memory = torch.arange(64.0)
    assert aligned(memory) is memory
    for view in (memory[1:33], memory.view(8, 8).t(), memory[::2]):
        got = aligned(view)
        assert got.is_contiguous()
        assert got.data_ptr() % 16 == 0
        assert torch.equal(got, view)
