"""The weighted sum of expert rows: its order, and its one rounding."""

from __future__ import annotations

import pytest
import torch

from moe_serve.kernels.combine import reference
from tests.kernels.row_independence import same_bits


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("has_shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adds_in_routing_order_and_rounds_once(dtype: torch.dtype, has_shared: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(21, 33).to(dtype)
    pair_of_choice = torch.randperm(21).view(7, 3)
    weights = torch.rand(7, 3)
    shared = torch.randn(7, 33) if has_shared else None
    got = reference.combine(rows, pair_of_choice, weights, shared)
    want = torch.zeros(7, 33)
    for token in range(7):
        for choice in range(3):
            want[token] += weights[token, choice] * rows[pair_of_choice[token, choice]].float()
        if shared is not None:
            want[token] += shared[token]
    assert same_bits(got, want.to(dtype))


def test_no_tokens_give_no_rows() -> None:
    empty = torch.empty(0, 2, dtype=torch.int64)
    assert reference.combine(torch.empty(0, 8), empty, torch.empty(0, 2)).shape == (0, 8)
