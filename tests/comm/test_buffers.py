"""Memory for what travels: kept while it serves, and not when it is much."""

from __future__ import annotations

import pytest
import torch

from moe_serve.comm import _buffers
from moe_serve.comm._buffers import Buffers


def test_the_same_memory_serves_again() -> None:
    buffers = Buffers()
    first = buffers.take("in", 6, 4, torch.float32)
    assert bool((first == 0).all())
    assert buffers.take("in", 6, 4, torch.float32) is first
    smaller = buffers.take("in", 3, 5, torch.bfloat16)
    assert smaller.shape == (3, 5)
    assert smaller.is_contiguous()
    assert smaller.data_ptr() == first.data_ptr()
    assert buffers.take("out", 6, 4, torch.float32).data_ptr() != first.data_ptr()
    larger = buffers.take("in", 60, 4, torch.float32)
    assert larger.shape == (60, 4)
    assert buffers.take("in", 6, 4, torch.float32).data_ptr() == larger.data_ptr()
    assert buffers.take("in", 0, 4, torch.float32).shape == (0, 4)


def test_what_is_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_buffers, "KEPT_BYTES", 64)
    buffers = Buffers()
    large = buffers.take("in", 5, 4, torch.float32)
    assert buffers.take("in", 5, 4, torch.float32) is not large
    small = buffers.take("in", 4, 4, torch.float32)
    assert buffers.take("in", 4, 4, torch.float32) is small
