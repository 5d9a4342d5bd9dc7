"""How kernels for sampling cut rows of logits into pieces, and what they all make of them."""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu import triton as _gpu  # noqa: F401

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.gpu.row_tiles import JOIN, VOCABULARY, Tiles, pieces, whole_rows

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
HIGHEST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def load_piece(
    logits, num_rows, row_stride, VOCAB: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Load a program's part of the logits: its rows [ROWS], its columns [1, COLUMNS], values."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_there = (row < num_rows)[:, None] & (column < VOCAB)
    at = logits + row[:, None] * row_stride + column
    return row, column, tl.load(at, mask=is_there, other=-float("inf")), is_there


@triton.jit
def in_piece(row):
    """Return where a program puts what it finds in its piece of `row`: [num_rows, num_pieces]."""
    return row * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def largest_of(values):
    """Return the largest value of each row; a NaN is none."""
    return tl.max(tl.where(values == values, values, -float("inf")), 1)


@triton.jit
def largest_of_row(largest, row, is_row, PIECES: tl.constexpr, PIECE_COLUMNS: tl.constexpr):
    """Join the largest logits of each row's pieces: [ROWS]."""
    piece = tl.arange(0, PIECE_COLUMNS)[None, :]
    is_there = is_row[:, None] & (piece < PIECES)
    at = row[:, None] * PIECES + piece
    return tl.max(tl.load(largest + at, mask=is_there, other=-float("inf")), 1)


@triton.jit
def least_of(min_ps, row, is_row, like):
    """Return the least logit, less the row's largest and after the temperature, that min_p keeps.

    min_ps: may be None. like: [ROWS], anything.
    """
    least = tl.full(like.shape, -float("inf"), tl.float32)
    if min_ps is not None:
        min_p = tl.load(min_ps + row, mask=is_row, other=0.0)
        least = tl.where(min_p > 0, tl.log(min_p), least)
    return least


@triton.jit
def scaled_of(values, anchor, temperature, least):
    """Return what reference.py's `scaled_logits` does, to the bit; a NaN becomes -inf."""
    scaled = tl.div_rn(values - anchor, temperature)
    return tl.where(scaled >= least, scaled, -float("inf"))


@triton.jit(do_not_specialize=["num_rows"])
def largest_of_piece(
    logits, largest, num_rows, row_stride,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the largest logit of each piece."""
    row, _, values, _ = load_piece(logits, num_rows, row_stride, VOCAB, ROWS, COLUMNS)
    tl.store(largest + in_piece(row), largest_of(values), mask=row < num_rows)


class Work:
    """How one batch of logits is cut into pieces, and where kernels put what they find.

    pieces, rows: the grids of a kernel for pieces and of one that joins them; cut, join: the
    arguments that say what a program of either has.
    """

    def __init__(self, logits: Tensor) -> None:
        assert logits.dtype == torch.float32, logits.dtype
        self.logits = logits if logits.stride(1) == 1 else logits.contiguous()
        self.num_rows, self.vocab_size = logits.shape
        self.row_stride = self.logits.stride(0)
        tiles = pieces(VOCABULARY, self.vocab_size)
        self.num_pieces = triton.cdiv(self.vocab_size, tiles.columns)
        self.pieces = triton.cdiv(self.num_rows, tiles.rows), self.num_pieces
        self.cut = {"VOCAB": self.vocab_size, **_program(tiles)}
        tiles = whole_rows(JOIN, self.num_pieces)
        self.piece_columns = tiles.columns
        self.rows = (triton.cdiv(self.num_rows, tiles.rows),)
        self.join = {"PIECES": self.num_pieces, **_program(tiles)}

    def of_pieces(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.num_rows, self.num_pieces, dtype=dtype, device=self.logits.device)

    def of_rows(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.num_rows, dtype=dtype, device=self.logits.device)


def _program(tiles: Tiles) -> dict[str, int]:
    return {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "num_warps": tiles.warps}
