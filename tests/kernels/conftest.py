"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.blas import one_blas_thread
from tests.kernels.implementations import INTERPRETED

POISON = -12_345  # what an integer that nobody wrote would be
# Interpreted, these take seconds each, and others like them run: with -m slow.
_LONG_INTERPRETED = (
    "::test_tokens_are_those_of_float64[triton",
    "::test_bits_do_not_depend_on_the_other_rows_or_the_threads[triton-exact-32000",
    "::test_tokens_of_a_wide_vocabulary_are_those_of_float64[triton-exact-0.1",
    "::test_tokens_of_a_wide_vocabulary_are_those_of_float64[triton-exact-3.0",
    "::test_tokens_of_a_wide_vocabulary_are_those_of_float64[triton-exact-10.0",
    "::test_tokens_do_not_see_each_other[triton-exact-1024-",
    "::test_tokens_do_not_see_each_other[triton-exact-shape16-",
    "::test_rows_do_not_see_each_other[triton-exact-64]",
    "::test_equals_the_reference_in_float64[1000-31-10-triton",
    "::test_equals_the_reference_in_float64[512-32-1-triton",
    "::test_pairs_do_not_see_each_other[fp32-triton-exact-136-40",
    "::test_a_query_does_not_see_the_batch[6-2-32-",
)


@pytest.fixture(autouse=True)
def _one_blas_thread() -> Iterator[None]:
    """Keep Triton's interpreter, which multiplies tiles with numpy, from waiting for busy cores."""
    with one_blas_thread():
        yield


@pytest.fixture
def poisoned_integers(monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    """Fill uninitialised integers too, so that ids and counts that nobody wrote show."""
    allocate = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(POISON) if tensor.dtype == torch.int64 else tensor

    monkeypatch.setattr(torch, "empty", empty)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long where kernels are interpreted."""
    for item in items:
        if INTERPRETED and any(part in item.nodeid for part in _LONG_INTERPRETED):
            item.add_marker(pytest.mark.slow)
