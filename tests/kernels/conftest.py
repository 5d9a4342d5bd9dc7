"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.blas import one_blas_thread

POISON = -12_345  # what an integer that nobody wrote would be


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
