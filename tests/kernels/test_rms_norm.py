"""Root-mean-square norm against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.rms_norm import reference
from tests.kernels.host_sync import no_host_sync
from tests.kernels.implementations import (
    DTYPES,
    EACH_EXACT,
    EACH_ON_A_GPU,
    each_exact_with,
    kernels,
)
from tests.kernels.row_independence import check_rows, same_bits

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # two roundings


def _norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm in float64 of rows of float64, but for the rounding in between."""
    normed = rows / torch.sqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(weight.dtype).double() * weight.double()


@EACH_EXACT
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        (0, 8), (1, 1), (1, 7), (2, 15), (5, 17), (3, 31), (15, 33), (9, 63), (33, 64), (9, 65),
        (7, 100), (17, 1000), (2, 1025), (2, 4097), (1, 9000),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_float64(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(shape) * 3).to(dtype)
    residual = (torch.randn(shape) * 3).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    got = kernels(name).rms_norm(rows, weight, 1e-5)
    normed, total = kernels(name).add_rms_norm(rows, residual, weight, 1e-5)
    assert same_bits(total, (rows.double() + residual.double()).to(dtype))
    tolerance = TOLERANCE[dtype]
    for ours, wide in ((got, rows.double()), (normed, total.double())):
        assert ours.dtype == dtype
        want = _norm(wide, weight, 1e-5)
        torch.testing.assert_close(ours.double(), want, rtol=tolerance, atol=tolerance / 10)


def test_more_than_two_dimensions() -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(5, 3, 32), torch.randn(32)
    got = reference.rms_norm(rows, weight, 1e-5)
    assert same_bits(got, reference.rms_norm(rows.view(15, 32), weight, 1e-5).view(5, 3, 32))


@EACH_EXACT
def test_rounds_where_it_says(name: str) -> None:
    torch.manual_seed(0)
    rows, residual = torch.randn(2, 90, 100, dtype=torch.bfloat16).unbind(0)
    weight = torch.randn(100, dtype=torch.bfloat16)
    normed, total = kernels(name).add_rms_norm(rows, residual, weight, 1e-6)
    assert same_bits(total, (rows.double() + residual.double()).to(torch.bfloat16))
    assert same_bits(normed, kernels(name).rms_norm(total, weight, 1e-6))
    want = _norm(total.double(), weight, 1e-6).to(torch.bfloat16)
    # ties are decided by the last bits of float32
    assert int((normed != want).sum()) < 0.005 * want.numel()


@EACH_EXACT
@DTYPES
def test_the_input_is_left_as_it_was_and_strides_do_not_matter(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows, residual, weight = torch.randn(9, 33), torch.randn(9, 33), torch.randn(33).to(dtype)
    rows, residual = rows.to(dtype), residual.to(dtype)
    before = rows.clone(), residual.clone()
    want = kernels(name).add_rms_norm(rows, residual, weight, 1e-6)
    assert same_bits(rows, before[0])
    assert same_bits(residual, before[1])
    wide = torch.cat([rows, residual], 1)
    parts = wide[:, :33], wide[:, 33:]
    for got, expected in zip(kernels(name).add_rms_norm(*parts, weight, 1e-6), want, strict=True):
        assert same_bits(got, expected)


@DTYPES
@each_exact_with("size", [64, 256, 1024, 2048], interpreted=[64, 2048])
def test_rows_do_not_see_each_other(name: str, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    # wide in range, so that sums in another order round otherwise
    rows = (torch.randn(150, size) * 10 ** (torch.rand(150, size) * 4 - 2)).to(dtype)
    residual, weight = torch.randn(150, size).to(dtype), torch.randn(size).to(dtype)

    def run(chosen: Tensor) -> tuple[Tensor, ...]:
        both = kernels(name).add_rms_norm(rows[chosen], residual[chosen], weight, 1e-6)
        return (kernels(name).rms_norm(rows[chosen], weight, 1e-6), *both)

    check_rows(name, 150, size, run)


@EACH_EXACT
@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(name: str, dtype: torch.dtype, bad: float) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(20, 50).to(dtype), torch.randn(50).to(dtype)
    want = kernels(name).rms_norm(rows, weight, 1e-6)
    broken = rows.clone()
    places = torch.tensor([0, 7, 19])
    broken[places, torch.tensor([0, 20, 49])] = bad
    got = kernels(name).rms_norm(broken, weight, 1e-6)
    assert bool(got[places].isnan().any(-1).all())
    sound = torch.ones(20, dtype=torch.bool).index_fill(0, places, False)
    assert same_bits(got[sound], want[sound])


@EACH_EXACT
@DTYPES
def test_rows_may_begin_anywhere_in_memory(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    memory, weight = torch.randn(3, 129).to(dtype).flatten(), torch.randn(128).to(dtype)
    for start in range(3):
        rows = memory[start : start + 256].view(2, 128)
        want = kernels(name).add_rms_norm(rows.clone(), rows.clone(), weight, 1e-6)
        for got, expected in zip(
            kernels(name).add_rms_norm(rows, rows, weight, 1e-6), want, strict=True
        ):
            assert same_bits(got, expected)


@EACH_ON_A_GPU
def test_never_waits_for_the_device(name: str) -> None:
    rows, weight = torch.randn(5, 64), torch.randn(64)
    with no_host_sync():
        kernels(name).rms_norm(rows, weight, 1e-6)
        kernels(name).add_rms_norm(rows, rows, weight, 1e-6)
