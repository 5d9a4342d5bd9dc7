"""Memory for weights: aligned, zero, and refused with a number where there is none."""

from __future__ import annotations

import pytest
import torch

from moe_serve.errors import CapacityError
from moe_serve.kernels.native.memory import allocate

HUGE_PAGE = 2**21


@pytest.mark.parametrize(
    ("num_bytes", "alignment"), [(1, 4096), (3 * 4096 + 5, 4096), (5 * HUGE_PAGE + 5, HUGE_PAGE)]
)
def test_memory_is_aligned_and_zero(num_bytes: int, alignment: int) -> None:
    memory = allocate(num_bytes)
    assert memory.shape == (num_bytes,)
    assert memory.dtype == torch.uint8
    assert memory.data_ptr() % alignment == 0
    assert not memory.any()
    memory.fill_(1)  # it can be written


def test_no_bytes_are_no_error() -> None:
    assert allocate(0).shape == (0,)


def test_no_memory_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match=f"no memory for {2**60} bytes of weights"):
        allocate(2**60)
