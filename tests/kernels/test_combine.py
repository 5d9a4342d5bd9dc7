"""The weighted sum of expert rows: its order, and its one rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.host_sync import no_host_sync
from tests.kernels.implementations import (
    DTYPES,
    EACH_EXACT,
    EACH_ON_A_GPU,
    INTERPRETED,
    each_exact_with,
    kernels,
)
from tests.kernels.row_independence import check_rows, same_bits

SHARED = pytest.mark.parametrize("shared_kind", ["routed", "shared", "weighed"])


def _inputs(
    num_tokens: int, top_k: int, size: int, dtype: torch.dtype, shared_kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(0)
    rows = torch.randn(num_tokens * top_k, size).to(dtype)
    pair_of_choice = torch.randperm(num_tokens * top_k).view(num_tokens, top_k)
    weights = torch.rand(num_tokens, top_k)
    shared = torch.randn(num_tokens, size).to(dtype) if shared_kind != "routed" else None
    shared_weights = torch.rand(num_tokens) if shared_kind == "weighed" else None
    return rows, pair_of_choice, weights, shared, shared_weights


@EACH_EXACT
@DTYPES
@SHARED
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "size"),
    [
        (0, 2, 8), (1, 1, 1), (1, 8, 7), (7, 3, 33), (15, 2, 31), (300, 2, 17), (33, 4, 100),
        (3, 8, 1000), (2, 10, 513),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_float64(
    name: str, dtype: torch.dtype, shared_kind: str, num_tokens: int, top_k: int, size: int
) -> None:
    if name in INTERPRETED:
        num_tokens = min(num_tokens, 40)
    inputs = _inputs(num_tokens, top_k, size, dtype, shared_kind)
    rows, pair_of_choice, weights, shared, shared_weights = inputs
    got = kernels(name).combine(*inputs)
    want = (rows.double()[pair_of_choice] * weights.double().unsqueeze(-1)).sum(1)
    if shared is not None:
        factor = torch.ones(num_tokens) if shared_weights is None else shared_weights
        want += shared.double() * factor.double().unsqueeze(-1)
    assert got.dtype == dtype
    assert got.shape == (num_tokens, size)
    torch.testing.assert_close(got, want.to(dtype), rtol=2**-7, atol=1e-6)
    if dtype == torch.bfloat16:  # one rounding only: but for ties it is that of float64
        assert int((got != want.to(dtype)).sum()) <= 0.005 * want.numel() + 1
    else:
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@EACH_EXACT
def test_adds_in_routing_order_and_then_the_shared_expert(name: str) -> None:
    # float32 has no room for a one beside 2**30: what is added before it is lost, after is kept
    rows = torch.tensor([[2.0**30], [1.0], [-(2.0**30)], [1.0]]).expand(4, 40).contiguous()
    weights = torch.ones(4, 3)
    choices = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 0, 3]])
    got = kernels(name).combine(rows, choices, weights)
    assert got.tolist() == [[value] * 40 for value in (0.0, 1.0, 0.0, 1.0)]
    shared = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).expand(4, 40).contiguous()
    got = kernels(name).combine(rows, choices, weights, shared)
    assert got.tolist() == [[value] * 40 for value in (1.0, 3.0, 3.0, 5.0)]
    got = kernels(name).combine(rows, choices, weights, shared, torch.full((4,), 0.5))
    assert got.tolist() == [[value] * 40 for value in (0.5, 2.0, 1.5, 3.0)]


@EACH_EXACT
def test_a_shared_expert_may_come_with_strides(name: str) -> None:
    rows, choices, weights, shared, _ = _inputs(9, 2, 33, torch.bfloat16, "shared")
    assert shared is not None
    want = kernels(name).combine(rows, choices, weights, shared)
    got = kernels(name).combine(
        rows.t().contiguous().t(), choices.t().contiguous().t(), weights.t().contiguous().t(),
        shared.t().contiguous().t(),
    )  # fmt: skip
    assert same_bits(got, want)


@DTYPES
@each_exact_with("size", [64, 256, 1024, 2048], interpreted=[1024])
def test_tokens_do_not_see_each_other(name: str, dtype: torch.dtype, size: int) -> None:
    rows, choices, weights, _, shared_weights = _inputs(80, 6, size, dtype, "weighed")
    assert shared_weights is not None
    # what is left is rounding: any other order shows
    shared = -kernels(name).combine(rows, choices, weights)

    def run(chosen: Tensor) -> tuple[Tensor, ...]:
        routed = rows, choices[chosen], weights[chosen]
        return (
            kernels(name).combine(*routed),
            kernels(name).combine(*routed, shared[chosen]),
            kernels(name).combine(*routed, shared[chosen], shared_weights[chosen]),
        )

    check_rows(name, 80, size, run)


@EACH_EXACT
@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_with_its_token(name: str, dtype: torch.dtype, bad: float) -> None:
    rows, choices, weights, shared, _ = _inputs(20, 3, 50, dtype, "shared")
    want = kernels(name).combine(rows, choices, weights, shared)
    broken = rows.clone()
    broken[choices[7, 1]] = bad
    got = kernels(name).combine(broken, choices, weights, shared)
    assert not bool(got[7].isfinite().any())
    sound = torch.arange(20) != 7
    assert same_bits(got[sound], want[sound])


@EACH_ON_A_GPU
def test_never_waits_for_the_device(name: str) -> None:
    inputs = _inputs(5, 2, 33, torch.bfloat16, "weighed")
    with no_host_sync():
        kernels(name).combine(*inputs)
