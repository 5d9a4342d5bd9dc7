"""Two kernels that measure a card: one that does next to nothing, and one that only reads."""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu.triton import IS_INTERPRETED

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 64 if IS_INTERPRETED else 4096
_STEPS = 4 if IS_INTERPRETED else 16


@triton.jit
def _store_one(out):
    tl.store(out, 1.0)


@triton.jit
def _read(source, out, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0)
    start = source + program.to(tl.int64) * COLUMNS * STEPS
    total = tl.zeros((COLUMNS,), tl.float32)
    for step in range(STEPS):
        total += tl.load(start + step * COLUMNS + tl.arange(0, COLUMNS))
    tl.store(out + program, tl.sum(total, 0))


def store_one(out: Tensor) -> None:
    """Launch one program that stores one number."""
    _store_one[(1,)](out)


def read(source: Tensor) -> Tensor:
    """Read float32 [n], all but a rest, and return sums of its pieces."""
    piece = _COLUMNS * _STEPS
    out = torch.empty(source.numel() // piece, dtype=torch.float32, device=source.device)
    _read[(out.numel(),)](source, out, COLUMNS=_COLUMNS, STEPS=_STEPS, num_warps=8)
    return out
