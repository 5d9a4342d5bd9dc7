"""Root-mean-square norm against float64."""

from __future__ import annotations

import pytest
import torch

from moe_serve.kernels.rms_norm import reference
from tests.kernels.row_independence import same_bits, subsets


@pytest.mark.parametrize("shape", [(0, 8), (1, 7), (5, 3, 32), (17, 1000)], ids=str)
def test_equals_float64(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
    wide = rows.double()
    want = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    torch.testing.assert_close(
        reference.rms_norm(rows, weight, 1e-5).double(), want, rtol=1e-5, atol=1e-6
    )


def test_the_residual_is_added_and_rounded_before_the_norm() -> None:
    torch.manual_seed(0)
    rows, residual = torch.randn(2, 9, 64, dtype=torch.bfloat16).unbind(0)
    weight = torch.randn(64, dtype=torch.bfloat16)
    normed, total = reference.add_rms_norm(rows, residual, weight, 1e-6)
    assert same_bits(total, (rows.double() + residual.double()).to(torch.bfloat16))
    assert same_bits(normed, reference.rms_norm(total, weight, 1e-6))


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(200, 1024), torch.randn(1024)
    whole = reference.rms_norm(rows, weight, 1e-6)
    for chosen, threads in subsets(200, seed=0, count=30):
        torch.set_num_threads(threads)
        assert same_bits(reference.rms_norm(rows[chosen], weight, 1e-6), whole[chosen])
