"""The plain-torch linear against float64, and its promise that rows do not see each other."""

from __future__ import annotations

import pytest
import torch

from moe_serve.kernels.linear import reference
from tests.kernels.row_independence import same_bits, subsets

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # relative to the largest product
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize(
    ("rows", "size_in", "size_out"), [(0, 64, 8), (1, 7, 3), (3, 63, 500), (13, 1000, 60)]
)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_equals_float64(
    dtype: torch.dtype, rows: int, size_in: int, size_out: int, has_bias: bool
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(rows, size_in, dtype=dtype)
    weight = torch.randn(size_out, size_in, dtype=dtype) * size_in**-0.5
    bias = torch.randn(size_out, dtype=dtype) if has_bias else None
    got = reference.linear(inputs, reference.pack(weight), bias)
    want = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert got.dtype == dtype
    assert got.shape == (rows, size_out)
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("size_in", [16, 64, 256, 1024, 2048])
@pytest.mark.parametrize("size_out", [1, 7, 8, 24, 384])
def test_rows_do_not_see_each_other(dtype: torch.dtype, size_in: int, size_out: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(80, size_in, dtype=dtype)
    weight = torch.randn(size_out, size_in, dtype=dtype) * size_in**-0.5
    whole = reference.linear(inputs, weight)
    for rows, threads in subsets(80, seed=size_in, count=30):
        torch.set_num_threads(threads)
        assert same_bits(reference.linear(inputs[rows], weight), whole[rows]), (len(rows), threads)
