"""What tests of kernels share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.blas import one_blas_thread
from tests.kernels.implementations import INTERPRETED

POISON = -12_345  # what an integer that nobody wrote would be
# Interpreted, each of these takes long, or has in all its parts others like it: with -m slow.
_LONG_INTERPRETED = re.compile(
    "|".join(
        f"::test_{part}"
        for part in (
            r"tokens_are_those_of_float64\[triton",
            r"bits_do_not_depend_on_the_other_rows_or_the_threads\[triton-exact-32000",
            r"tokens_of_a_wide_vocabulary_are_those_of_float64\[triton-exact-(0\.1|3\.0|10\.0)",
            # all equal, close and far apart: each with the whole row at once, and with its groups
            r"the_survivors_are_those_of_float64\[(1000-0\.1|8193-0\.1|20000-0\.0|20000-30\.0)",
            r"tokens_do_not_see_each_other\[triton-exact-(1024|shape16)-",
            r"rows_do_not_see_each_other\[triton-exact-64\]",
            r"equals_the_reference_in_float64\[(1000-31-10|512-32-1)-triton",
            r"pairs_do_not_see_each_other\[fp32-triton-exact-136-40",
            r"a_query_does_not_see_the_batch\[6-2-32-",
            # every kind at three sizes, and two kinds at every size
            r"equals_float64_and_writes_nowhere_else"
            r"\[(1-1-2|6-2-16|4-4-30|5-1-64)-(?!full-clip-fp32|head-bf16).*-triton",
            r"what_is_not_finite_stays_with_its_token\[-?inf-[a-z-]+-bf16-triton",
            r"what_is_not_finite_stays_in_its_row\[(\d+-\d+--inf|64-24-inf)-(fp32|bf16)-triton",
            r"every_choice_gets_its_result_back\[(1-.*-bf16|3-.*-fp32)-triton",
            r"a_wrong_row_gets_some_token_and_changes_no_other"
            r"\[triton-exact-(none-17|none-5000|min_p-1000|top_k-17|top_k-5000|all-1000)",
            r"lengths_and_blocks_may_change_under_a_plan\[(132-None|1-40)-triton-fast",
        )
    )
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
        if INTERPRETED and _LONG_INTERPRETED.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
