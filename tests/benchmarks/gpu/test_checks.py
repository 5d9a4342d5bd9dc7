from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.cases import Bench
from benchmarks.gpu.checks import CHECKS, CheckFailed, poisoned
from benchmarks.gpu.shapes import TINY
from moe_serve.kernels import suite
from moe_serve.kernels.suite import Kernels

ROWS = 40


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return suite.load("reference")


def is_close_only(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a kernel that is right, but whose bits depend on the number of rows."""

    def changed(rows: Tensor, *given: Any) -> Tensor:
        return function(rows, *given) * (1.0 + len(rows) / 1e4)

    return changed


def moves(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a kernel that is right, but not the same in every run."""
    calls = iter(range(10**6))

    def changed(*given: Any) -> Tensor:
        return function(*given) * (1.0 + next(calls) % 2 / 100)

    return changed


def unwritten(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a kernel that leaves out its last row."""

    def changed(*given: Any) -> Tensor:
        result = function(*given)
        out = torch.empty(result.shape, dtype=result.dtype)
        out[:-1] = result[:-1]
        return out

    return changed


@pytest.mark.parametrize("name", CHECKS)
def test_right_kernels_pass(name: str, kernels: Kernels) -> None:
    CHECKS[name](Bench(TINY, kernels), ROWS, True)


@pytest.mark.parametrize(
    ("wrong", "is_exact"), [(is_close_only, True), (moves, False), (unwritten, False)]
)
@pytest.mark.parametrize(
    ("name", "kernel"), [("linear", "linear"), ("moe", "moe"), ("attention", "paged_attention")]
)
def test_wrong_kernels_do_not(
    name: str,
    kernel: str,
    wrong: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
    is_exact: bool,
    kernels: Kernels,
) -> None:
    changed: Any = {kernel: wrong(getattr(kernels, kernel))}
    broken = replace(kernels, **changed)
    with pytest.raises(CheckFailed):
        CHECKS[name](Bench(TINY, broken), ROWS, is_exact)


def test_what_is_not_written_is_nan() -> None:
    with poisoned():
        assert bool(torch.empty(3, 2).isnan().all())
        assert torch.empty(3, dtype=torch.int64).shape == (3,)


def test_wrong_routing_is_seen(kernels: Kernels) -> None:
    def route(logits: Tensor, *given: Any) -> Any:
        return kernels.route(-logits, *given)

    with pytest.raises(CheckFailed, match="experts of tokens"):
        CHECKS["rows"](Bench(TINY, replace(kernels, route=route)), ROWS, True)


def test_fast_kernels_may_depend_on_the_number_of_rows(kernels: Kernels) -> None:
    close = replace(kernels, linear=is_close_only(kernels.linear))
    CHECKS["linear"](Bench(TINY, close), ROWS, False)
