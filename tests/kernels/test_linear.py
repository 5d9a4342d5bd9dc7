"""The plain-torch linear against float64, and its promise that rows do not see each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.linear import reference
from tests.kernels.row_independence import same_bits

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


def cancelling(rows: int, size_in: int, size_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows and a weight whose products are 0 but for rounding: any other order shows."""
    half = -(-size_in // 2)
    terms = torch.randn(rows, half).to(dtype)
    weight = torch.randn(size_out, half).to(dtype)
    rest = size_in - half
    return torch.cat([terms, -terms[:, :rest]], 1), torch.cat([weight, weight[:, :rest]], 1)


@DTYPES
@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [
        *itertools.product([16, 64, 256, 1024, 2048, 2880], [1, 7, 8, 24, 384, 512]),
        # matrices so small, or with sides so odd, that libraries have code of their own for them
        (56, 48), (40, 48), (24, 48), (1022, 8), (10, 8), (7, 11), (3, 5), (1, 1), (172, 64),
    ],
)  # fmt: skip
def test_rows_do_not_see_each_other(dtype: torch.dtype, size_in: int, size_out: int) -> None:
    torch.manual_seed(0)
    inputs, weight = cancelling(260, size_in, size_out, dtype)
    whole = reference.linear(inputs, weight)
    for count, threads in itertools.product((1, 2, 3, 4, 5, 9, 31, 37, 130), (1, 2)):
        rows = torch.randperm(260)[:count]
        torch.set_num_threads(threads)
        assert same_bits(reference.linear(inputs[rows], weight), whole[rows]), (count, threads)


def test_a_shape_that_no_count_makes_exact_is_added_up() -> None:
    # measured: with 8 outputs and 1,022 inputs a row's bits show its place in the batch
    assert reference.multiplier(torch.empty(8, 1022)) in (
        reference._add_up,
        reference._multiply,  # where the library has one order
    )
    torch.manual_seed(0)
    inputs, weight = torch.randn(50, 33), torch.randn(9, 33)
    out = torch.empty(50, 9)
    reference._add_up(inputs, weight, out)
    torch.testing.assert_close(
        out.double(), inputs.double() @ weight.double().T, rtol=1e-5, atol=1e-5
    )
