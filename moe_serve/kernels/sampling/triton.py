"""Sampling on a GPU: what every step needs, without asking the device for anything.

A row is cut into pieces of the vocabulary, so that one row is read by many programs; a second
kernel joins what they found. No sum of floats decides a choice: a row's token is the same however
it lies in memory.

Noise has reference.py's uniform numbers to the bit. Its logarithms, here and there, are within a
few units in the last place of each other, and scores are compared first within a piece, less that
piece's largest logit: where two scores are so near, another token may win than on a CPU.
"""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu.triton import ordered

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.sampling import reference
from moe_serve.kernels.sampling.cut.triton import cut_of_rows
from moe_serve.kernels.sampling.pieces.triton import (
    HIGHEST,
    LOWEST,
    Work,
    in_piece,
    largest_of,
    largest_of_piece,
    largest_of_row,
    least_of,
    load_piece,
    scaled_of,
)

# edits are index operations, which torch does without asking the device
row_keys = reference.row_keys
token_hashes = reference.token_hashes
keep_only_ = reference.keep_only_
forbid_ = reference.forbid_
add_bias_ = reference.add_bias_
penalise_ = reference.penalise_

_NOISE_SCALE: tl.constexpr = tl.constexpr(reference.NOISE_SCALE)
_LOG_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _first(keys, ids):
    """Return the largest key of each row, and the lowest id that has it: int32 [rows]."""
    most = tl.max(keys, 1)
    return most, tl.min(tl.where(keys == most[:, None], ids, HIGHEST), 1)


# Greedy choice


@triton.jit(do_not_specialize=["num_rows"])
def _greedy_of_piece(
    logits, best, ids, wrong, num_rows, row_stride,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the best token of each piece, and whether a logit in it is NaN or infinite."""
    row, column, values, is_there = load_piece(logits, num_rows, row_stride, VOCAB, ROWS, COLUMNS)
    keys = tl.where(is_there, ordered(values), LOWEST)
    most, first = _first(keys, column)
    is_wrong = is_there & ~(tl.abs(values) < float("inf"))
    at, is_row = in_piece(row), row < num_rows
    tl.store(best + at, most, mask=is_row)
    tl.store(ids + at, first, mask=is_row)
    tl.store(wrong + at, tl.max(is_wrong.to(tl.int32), 1), mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def _greedy_of_row(
    best, ids, wrong, tokens, is_finite, num_rows,
    PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Join the pieces of each row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    piece = tl.arange(0, COLUMNS)[None, :]
    at = row[:, None] * PIECES + piece
    is_there = (row < num_rows)[:, None] & (piece < PIECES)
    keys = tl.load(best + at, mask=is_there, other=LOWEST)
    _, first = _first(keys, tl.load(ids + at, mask=is_there, other=HIGHEST))
    is_wrong = tl.max(tl.load(wrong + at, mask=is_there, other=0), 1)
    tl.store(tokens + row, first.to(tl.int64), mask=row < num_rows)
    tl.store(is_finite + row, is_wrong == 0, mask=row < num_rows)


def greedy_checked(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Do what reference.py's `greedy_checked` does, without a sync of the host."""
    work = Work(logits)
    best, ids, wrong = (work.of_pieces(torch.int32) for _ in range(3))
    tokens, is_finite = work.of_rows(torch.int64), work.of_rows(torch.bool)
    if work.num_rows:
        _greedy_of_piece[work.pieces](
            work.logits, best, ids, wrong, work.num_rows, work.row_stride, **work.cut
        )
        _greedy_of_row[work.rows](best, ids, wrong, tokens, is_finite, work.num_rows, **work.join)
    return tokens, is_finite


# Sampling


@triton.jit
def _mixed(words):
    """Mix uint32 words as reference.py's `_mix_32_` does."""
    words ^= words >> 16
    words *= 0x21F0AAAD
    words ^= words >> 15
    words *= 0xD35A2D97
    return words ^ (words >> 15)


@triton.jit
def _noise_key(keys, row, is_row):
    multiplier = tl.load(keys + 2 * row, mask=is_row, other=0)
    addend = tl.load(keys + 2 * row + 1, mask=is_row, other=0)
    return multiplier.to(tl.uint32, bitcast=True), addend.to(tl.uint32, bitcast=True)


@triton.jit
def _noise_words(multiplier, addend, hashes):
    """Return each token's word of noise as float32, from 0 to 2**31."""
    words = _mixed(hashes.to(tl.uint32, bitcast=True) * multiplier + addend) & 0x7FFFFFFF
    return words.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def _gumbel(words):
    """Return the noise of such words, as reference.py's `gumbel_noise` does."""
    uniform = (words + 0.5) * _NOISE_SCALE
    left = 1.0 - uniform
    lost = (1.0 - left) - uniform  # what rounding took from `left`
    return -tl.log(-(tl.log(left) + lost / left))


@triton.jit
def _most_gumbel(words):
    """Return what their noise is at most, by less than 0.07 in excess where it is above 3.

    -log(1 - u) >= u, and the bits of a float, read as an integer, are a lower bound of its log2.
    """
    log_2 = words.to(tl.int32, bitcast=True).to(tl.float32) * (1.0 / 8388608.0) - 127.0
    return (31.0 - log_2) * _LOG_2 + 1e-4


@triton.jit
def _score(value, anchor, temperature, least, words):
    """Return logits after the temperature, plus noise; -inf for what is below `least` before."""
    scaled = scaled_of(value, anchor, temperature, least)
    score = scaled + _gumbel(words)
    return tl.where(score > -float("inf"), score, -float("inf"))


@triton.jit
def _may_be_best(bound, best):
    return (bound >= best) & (bound > -float("inf"))


@triton.jit(do_not_specialize=["num_rows"])
def _sample_of_piece(
    logits, temperatures, min_ps, cut_keys, cut_tokens, keys, hashes, largest, tokens, num_rows,
    row_stride, VOCAB: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, PIECE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the token of the best score in each piece; HIGHEST where the filters leave none.

    largest: [num_rows, PIECES], the pieces' largest logits; written if nothing is filtered. Scores
    are first bounded from above; what could be best then gets its noise, one token at a time, until
    no other can be better.
    """
    row, column, values, _ = load_piece(logits, num_rows, row_stride, VOCAB, ROWS, COLUMNS)
    is_row = row < num_rows
    temperature = tl.load(temperatures + row, mask=is_row, other=1.0)
    anchor = largest_of(values)
    least = least_of(min_ps, row, is_row, anchor)
    is_open = values > -float("inf")
    if min_ps is None and cut_keys is None:
        tl.store(largest + in_piece(row), anchor, mask=is_row)
    else:
        of_row = largest_of_row(largest, row, is_row, PIECES, PIECE_COLUMNS)
        anchor = tl.where(least > -float("inf"), of_row, anchor)
    if cut_keys is not None:
        cut_key = tl.load(cut_keys + row, mask=is_row, other=LOWEST)[:, None]
        cut_token = tl.load(cut_tokens + row, mask=is_row, other=HIGHEST)[:, None]
        scaled = scaled_of(values, of_row[:, None], temperature[:, None], -float("inf"))
        order = ordered(scaled)
        is_open &= (order > cut_key) | ((order == cut_key) & (column <= cut_token))

    multiplier, addend = _noise_key(keys, row, is_row)
    words = _noise_words(
        multiplier[:, None], addend[:, None], tl.load(hashes + column, mask=column < VOCAB, other=0)
    )
    # a little more than what `_score` makes of it
    scaled = (values - anchor[:, None]) * ((1.0 - 1e-6) / temperature)[:, None]
    bounds = scaled + _most_gumbel(words)
    is_open &= (bounds > -float("inf")) & (scaled >= least[:, None])
    bounds = tl.where(is_open, bounds, -float("inf"))

    best = tl.full([ROWS], -float("inf"), tl.float32)
    best_token = tl.full([ROWS], HIGHEST, tl.int32)
    bound = tl.max(bounds, 1)
    while tl.max(_may_be_best(bound, best).to(tl.int32), 0) > 0:
        token = tl.min(tl.where(bounds == bound[:, None], column, HIGHEST), 1)
        is_asked = is_row & _may_be_best(bound, best)
        value = tl.load(logits + row * row_stride + token, mask=is_asked, other=-float("inf"))
        its_words = _noise_words(
            multiplier, addend, tl.load(hashes + token, mask=is_asked, other=0)
        )
        score = _score(value, anchor, temperature, least, its_words)
        is_better = (score > best) | ((score == best) & (token < best_token))
        is_better &= is_asked & (score > -float("inf"))
        best_token = tl.where(is_better, token, best_token)
        best = tl.where(is_better, score, best)
        bounds = tl.where(column == token[:, None], -float("inf"), bounds)
        bound = tl.max(bounds, 1)
    tl.store(tokens + in_piece(row), best_token, mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def _sample_of_row(
    logits, temperatures, keys, hashes, largest, tokens, chosen, num_rows, row_stride,
    PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Choose among the tokens of the pieces, by their scores less the row's largest logit."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    piece = tl.arange(0, COLUMNS)[None, :]
    is_row = row < num_rows
    at = row * PIECES + piece
    is_there = is_row & (piece < PIECES)
    anchor = tl.max(tl.load(largest + at, mask=is_there, other=-float("inf")), 1)[:, None]
    token = tl.load(tokens + at, mask=is_there, other=HIGHEST)
    is_there = is_there & (token < HIGHEST)
    value = tl.load(logits + row * row_stride + token, mask=is_there, other=-float("inf"))
    temperature = tl.load(temperatures + row, mask=is_row, other=1.0)
    multiplier, addend = _noise_key(keys, row, is_row)
    words = _noise_words(multiplier, addend, tl.load(hashes + token, mask=is_there, other=0))
    score = _score(value, anchor, temperature, -float("inf"), words)
    is_best = is_there & (score == tl.max(score, 1)[:, None])
    found = tl.min(tl.where(is_best, token, HIGHEST), 1)[:, None]
    # a row of nothing but wrong logits has no token
    tl.store(chosen + row, tl.where(found < HIGHEST, found, 0).to(tl.int64), mask=is_row)


def sample(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    keys: Tensor,
    hashes: Tensor,
) -> Tensor:
    """Do what reference.py's `sample` does, without a sync of the host."""
    work = Work(logits)
    assert hashes.shape == (work.vocab_size,), (hashes.shape, work.vocab_size)
    chosen = work.of_rows(torch.int64)
    if not work.num_rows:
        return chosen
    largest, tokens = work.of_pieces(torch.float32), work.of_pieces(torch.int32)
    rows = work.num_rows, work.row_stride
    cuts: tuple[Tensor | None, Tensor | None] = None, None
    if not (min_p is top_k is top_p is None):
        largest_of_piece[work.pieces](work.logits, largest, *rows, **work.cut)
    if not (top_k is top_p is None):
        cuts = cut_of_rows(work, temperature, min_p, top_k, top_p, largest)
    noise = keys.contiguous(), hashes, largest, tokens
    # so that a score is the same in both kernels
    options = {"enable_fp_fusion": False}
    _sample_of_piece[work.pieces](
        work.logits, temperature, min_p, *cuts, *noise, *rows, **work.cut, **options,
        PIECES=work.num_pieces, PIECE_COLUMNS=work.piece_columns,
    )  # fmt: skip
    _sample_of_row[work.rows](
        work.logits, temperature, *noise, chosen, *rows, **work.join, **options
    )
    return chosen


# Logprobs


# one order of adding, whatever the rows' alignment is
@triton.jit(do_not_specialize=["num_rows", "row_stride"], do_not_specialize_on_alignment=["logits"])
def _mass_of_piece(
    logits, token_ids, largest, mass, before, num_rows, row_stride,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum exp(logit - the piece's largest), and count the tokens that come before the chosen."""
    row, column, values, is_there = load_piece(logits, num_rows, row_stride, VOCAB, ROWS, COLUMNS)
    is_row = row < num_rows
    chosen = tl.load(token_ids + row, mask=is_row, other=0)
    value = tl.load(logits + row * row_stride + chosen, mask=is_row, other=0.0)[:, None]
    anchor = largest_of(values)
    powers = tl.exp(values - tl.where(anchor > -float("inf"), anchor, 0.0)[:, None])
    is_before = (values > value) | ((values == value) & (column < chosen[:, None]))
    at = in_piece(row)
    tl.store(largest + at, anchor, mask=is_row)
    tl.store(mass + at, tl.sum(powers, 1), mask=is_row)
    tl.store(before + at, tl.sum((is_there & is_before).to(tl.int32), 1), mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def _mass_of_row(
    largest, mass, before, ranks, anchors, log_sums, num_rows,
    PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Join the pieces: a row's logprobs are its logits less `anchors`, less `log_sums`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    piece = tl.arange(0, COLUMNS)[None, :]
    at = row[:, None] * PIECES + piece
    is_row = row < num_rows
    is_there = is_row[:, None] & (piece < PIECES)
    of_piece = tl.load(largest + at, mask=is_there, other=-float("inf"))
    anchor = tl.max(of_piece, 1)
    shares = tl.load(mass + at, mask=is_there, other=0.0) * tl.exp(of_piece - anchor[:, None])
    tl.store(anchors + row, anchor, mask=is_row)
    tl.store(log_sums + row, tl.log(tl.sum(tl.where(is_there, shares, 0.0), 1)), mask=is_row)
    rank = tl.sum(tl.load(before + at, mask=is_there, other=0), 1) + 1
    tl.store(ranks + row, rank.to(tl.int64), mask=is_row)


def chosen_logprobs(
    logits: Tensor, token_ids: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what reference.py's `chosen_logprobs` does, without a sync of the host."""
    work = Work(logits)
    ranks = work.of_rows(torch.int64)
    anchors, log_sums = work.of_rows(torch.float32), work.of_rows(torch.float32)
    if work.num_rows:
        largest, mass = work.of_pieces(torch.float32), work.of_pieces(torch.float32)
        before = work.of_pieces(torch.int32)
        _mass_of_piece[work.pieces](
            work.logits, token_ids.contiguous(), largest, mass, before,
            work.num_rows, work.row_stride, **work.cut,
        )  # fmt: skip
        _mass_of_row[work.rows](
            largest, mass, before, ranks, anchors, log_sums, work.num_rows, **work.join
        )
    top_ids = reference.ranked(logits, top)
    logprobs, top_logprobs = (
        logits.gather(1, ids) - anchors[:, None] - log_sums[:, None]
        for ids in (token_ids[:, None], top_ids)
    )
    return logprobs.squeeze(1), ranks, top_ids, top_logprobs
