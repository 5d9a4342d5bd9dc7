"""Memory for what travels: kept while it serves, and not when it is much."""

from __future__ import annotations

import pytest
import torch

from moe_serve.comm import _buffers
from moe_serve.comm._buffers import Buffers
from moe_serve.comm._world import HOST


def test_the_same_memory_serves_again() -> None:
    buffers = Buffers(HOST)
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
    buffers = Buffers(HOST)
    large = buffers.take("in", 5, 4, torch.float32)
    assert buffers.take("in", 5, 4, torch.float32) is not large
    small = buffers.take("in", 4, 4, torch.float32)
    assert buffers.take("in", 4, 4, torch.float32) is small


def test_what_was_outgrown_stays_where_it_is_and_little_of_it() -> None:
    """A CUDA graph may go on using it; and it must not be as much as was ever asked for."""
    buffers = Buffers(HOST)
    given = [buffers.take("in", rows, 4, torch.float32) for rows in range(1, 200)]
    addresses = {view.untyped_storage().data_ptr() for view in given}
    assert len(addresses) == 8 + 1  # 16, 32 ... 4096 bytes
    assert sum(len(kept) for kept in buffers._outgrown) < 4096
    kept = {memory.data_ptr() for memory in buffers._outgrown}
    assert kept < addresses
    assert len(kept) == 8
