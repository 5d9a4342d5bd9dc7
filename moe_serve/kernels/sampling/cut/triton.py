"""Where top-k and top-p cut each row's tokens, found on a GPU without a sync of the host.

Tokens are in the order of their scaled logits, equal ones in that of their ids; what the filters
leave are the first of them, up to a key (a scaled logit as an integer) and, of those that have this
key, up to a token. Both are found by trying the bits of a key: those not below it must be as many,
or as likely, as is asked for.

A row's tokens are in groups. The groups with the highest best tokens hold all tokens above the best
token of the next group: nearly always enough to find the cut among, in registers. Where they are
not, the row's one program goes through all of its logits again for each bit: slow, and as right.
"""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu.triton import ordered

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.gpu.row_tiles import CUT, power_of_two
from moe_serve.kernels.sampling.pieces.triton import (
    HIGHEST,
    LOWEST,
    Work,
    in_piece,
    largest_of_row,
    least_of,
    load_piece,
    scaled_of,
)

# tokens of a group
GROUP = 16


# one order of adding, whatever the rows' alignment is
@triton.jit(do_not_specialize=["num_rows", "row_stride"], do_not_specialize_on_alignment=["logits"])
def _groups_of_piece(
    logits, temperatures, min_ps, largest, group_keys, masses, num_rows, row_stride,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
    PIECE_COLUMNS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Find each group's largest key, and the sum of a piece's exp(scaled logit)."""
    row, _, values, is_there = load_piece(logits, num_rows, row_stride, VOCAB, ROWS, COLUMNS)
    is_row = row < num_rows
    anchor = largest_of_row(largest, row, is_row, PIECES, PIECE_COLUMNS)
    temperature = tl.load(temperatures + row, mask=is_row, other=1.0)
    least = least_of(min_ps, row, is_row, anchor)
    scaled = scaled_of(values, anchor[:, None], temperature[:, None], least[:, None])
    tl.store(masses + in_piece(row), tl.sum(tl.exp(scaled), 1), mask=is_row)
    if NUM_GROUPS > 0:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        keys = tl.where(is_there, ordered(scaled), LOWEST)
        most = tl.max(tl.reshape(keys, [ROWS, GROUPS, GROUP]), 2)
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
        is_group = is_row[:, None] & (group < NUM_GROUPS)
        tl.store(group_keys + row[:, None] * NUM_GROUPS + group, most, mask=is_group)


@triton.jit
def _power(key):
    """Return exp of the scaled logit whose key it is."""
    return tl.exp((key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


@triton.jit
def _keys_of(row_logits, token, anchor, temperature, least, VOCAB: tl.constexpr):
    """Load tokens' keys, of which those outside the vocabulary have the lowest."""
    values = tl.load(row_logits + token, mask=token < VOCAB, other=-float("inf"))
    scaled = scaled_of(values, anchor, temperature, least)
    return tl.where(token < VOCAB, ordered(scaled), LOWEST)


@triton.jit
def _weight(
    key, keys, masses, row_logits, anchor, temperature, least,
    IS_COUNT: tl.constexpr, IS_ALL: tl.constexpr, VOCAB: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Count or weigh the tokens whose keys are not below `key`; float32.

    keys, masses: [COLUMNS], of the tokens that are looked at; or IS_ALL: of all that the row has.
    """
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, VOCAB if IS_ALL else COLUMNS, COLUMNS):
        if IS_ALL:
            token = start + tl.arange(0, COLUMNS)
            keys = _keys_of(row_logits, token, anchor, temperature, least, VOCAB)
            masses = _power(keys)
        total += tl.where(keys >= key, 1.0 if IS_COUNT else masses, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _threshold(
    target, keys, masses, row_logits, anchor, temperature, least,
    IS_COUNT: tl.constexpr, IS_ALL: tl.constexpr, VOCAB: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the largest key such that those not below it are as many, or weigh, as `target`.

    And what those above it weigh.
    """
    found = tl.full([], LOWEST, tl.int32)
    above = tl.full([], 0.0, tl.float32)
    one = tl.full([], 1, tl.int32)
    for bit in range(32):
        trial = found ^ (one << (31 - bit))
        weight = _weight(
            trial, keys, masses, row_logits, anchor, temperature, least,
            IS_COUNT, IS_ALL, VOCAB, COLUMNS,
        )  # fmt: skip
        above = tl.where(weight >= target, above, weight)
        found = tl.where(weight >= target, trial, found)
    return found, above


@triton.jit
def _last_of_ties(
    key, count, keys, token, row_logits, anchor, temperature, least,
    IS_ALL: tl.constexpr, VOCAB: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the token that is number `count`, or the last, of those that have the key."""
    last = tl.full([], -1, tl.int32)
    for start in range(0, VOCAB if IS_ALL else COLUMNS, COLUMNS):
        if IS_ALL:
            token = start + tl.arange(0, COLUMNS)
            keys = _keys_of(row_logits, token, anchor, temperature, least, VOCAB)
        is_tied = (keys == key).to(tl.int32)
        is_kept = (is_tied > 0) & (tl.cumsum(is_tied, 0) <= count)
        last = tl.maximum(last, tl.max(tl.where(is_kept, token, -1), 0))
        count -= tl.sum(is_tied, 0)
    return last


@triton.jit
def _cut(
    top_k, top_p, total, bound, keys, masses, token, row_logits, anchor, temperature, least,
    IS_ALL: tl.constexpr, VOCAB: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the key and the token of the last survivor, and whether they are right.

    They are, where tokens are looked at that hold all whose keys are above `bound`, if the cut is
    above it too. total: the sum of exp(scaled logit) of the row.
    """
    key = tl.full([], LOWEST, tl.int32)
    num_tied = tl.full([], HIGHEST, tl.int32)
    is_known = top_k >= VOCAB
    if top_k < VOCAB:
        key, above = _threshold(
            top_k.to(tl.float32), keys, masses, row_logits, anchor, temperature, least,
            True, IS_ALL, VOCAB, COLUMNS,
        )  # fmt: skip
        num_tied = top_k - above.to(tl.int32)
        is_known = key > bound
        total = num_tied.to(tl.float32) * _power(key) + _weight(
            key + 1, keys, masses, row_logits, anchor, temperature, least,
            False, IS_ALL, VOCAB, COLUMNS,
        )  # fmt: skip
    if top_p < 1.0:
        target = (total.to(tl.float64) * top_p).to(tl.float32)
        p_key, above = _threshold(
            target, keys, masses, row_logits, anchor, temperature, least,
            False, IS_ALL, VOCAB, COLUMNS,
        )  # fmt: skip
        share = tl.where(p_key > LOWEST, _power(p_key), 1.0)
        wanted = tl.where(share > 0, (target - above) / share, 1e9)
        p_tied = tl.ceil(tl.minimum(tl.maximum(wanted, 1.0), 1e9)).to(tl.int32)
        num_tied = tl.where(p_key == key, tl.minimum(num_tied, p_tied), num_tied)
        num_tied = tl.where(p_key > key, p_tied, num_tied)
        is_known = is_known & (p_key > bound)
        key = tl.maximum(key, p_key)
    last = _last_of_ties(
        key, num_tied, keys, token, row_logits, anchor, temperature, least, IS_ALL, VOCAB, COLUMNS
    )
    return key, last, is_known


@triton.jit
def _best_groups(
    group_keys, groups, NUM_GROUPS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr
):
    """Write the GROUPS groups of the largest keys, in order; tokens above what is returned are
    in them.
    """
    group = tl.arange(0, COLUMNS)
    keys = tl.load(group_keys + group, mask=group < NUM_GROUPS, other=LOWEST)
    bound, above = _threshold(
        tl.full([], GROUPS, tl.float32), keys, keys, keys, 0.0, 1.0, 0.0,
        True, False, NUM_GROUPS, COLUMNS,
    )  # fmt: skip
    is_tied = (keys == bound).to(tl.int32)
    is_best = (keys > bound) | ((is_tied > 0) & (tl.cumsum(is_tied, 0) <= GROUPS - above))
    place = tl.cumsum(is_best.to(tl.int32), 0) - 1
    tl.store(groups + place, group, mask=is_best)
    return bound


@triton.jit(do_not_specialize=["row_stride"], do_not_specialize_on_alignment=["logits"])
def _cut_of_row(
    logits, temperatures, min_ps, top_ks, top_ps, largest, masses, group_keys, groups,
    cut_keys, cut_tokens, row_stride,
    VOCAB: tl.constexpr, PIECES: tl.constexpr, PIECE_COLUMNS: tl.constexpr,
    NUM_GROUPS: tl.constexpr, GROUP_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find one row's last survivor. NUM_GROUPS is 0 where COLUMNS holds the whole vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    top_k = tl.full([], VOCAB, tl.int32)
    top_p = tl.full([], 1.0, tl.float64)
    if top_ks is not None:
        top_k = tl.minimum(tl.load(top_ks + row), VOCAB).to(tl.int32)
    if top_ps is not None:
        top_p = tl.load(top_ps + row)
    key = tl.full([], LOWEST, tl.int32)
    last = tl.full([], HIGHEST, tl.int32)
    if (top_k < VOCAB) | (top_p < 1.0):
        piece = tl.arange(0, PIECE_COLUMNS)
        is_piece = piece < PIECES
        at = row * PIECES + piece
        anchor = tl.max(tl.load(largest + at, mask=is_piece, other=-float("inf")), 0)
        total = tl.sum(tl.load(masses + at, mask=is_piece, other=0.0), 0)
        temperature = tl.load(temperatures + row)
        least = tl.max(least_of(min_ps, row, True, tl.full([1], 0, tl.int32)), 0)
        token = tl.arange(0, COLUMNS)
        bound = tl.full([], LOWEST, tl.int32)
        if NUM_GROUPS > 0:
            GROUPS: tl.constexpr = COLUMNS // GROUP
            groups += row * GROUPS
            bound = _best_groups(
                group_keys + row * NUM_GROUPS, groups, NUM_GROUPS, GROUP_COLUMNS, GROUPS
            )
            tl.debug_barrier()
            token = tl.load(groups + token // GROUP) * GROUP + token % GROUP
        row_logits = logits + row * row_stride
        keys = _keys_of(row_logits, token, anchor, temperature, least, VOCAB)
        powers = _power(keys)
        key, last, is_known = _cut(
            top_k, top_p, total, bound, keys, powers, token, row_logits, anchor, temperature,
            least, False, VOCAB, COLUMNS,
        )  # fmt: skip
        if is_known == 0:
            key, last, is_known = _cut(
                top_k, top_p, total, bound, keys, powers, token, row_logits, anchor, temperature,
                least, True, VOCAB, COLUMNS,
            )  # fmt: skip
    tl.store(cut_keys + row, key)
    tl.store(cut_tokens + row, last)


def cut_of_rows(
    work: Work,
    temperature: Tensor,
    min_p: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    largest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the key and the token of each row's last survivor: int32 [num_rows] both.

    largest: the largest logits of pieces, [num_rows, num_pieces]; the other columns as in `sample`.
    A row that nothing filters has the lowest key.
    """
    columns = min(CUT.columns, power_of_two(work.vocab_size))
    num_groups = 0 if columns >= work.vocab_size else triton.cdiv(work.vocab_size, GROUP)
    device = work.logits.device
    group_keys = torch.empty(work.num_rows, num_groups, dtype=torch.int32, device=device)
    groups = torch.empty(work.num_rows, columns // GROUP, dtype=torch.int32, device=device)
    masses = work.of_pieces(torch.float32)
    keys, tokens = work.of_rows(torch.int32), work.of_rows(torch.int32)
    pieces = {"PIECES": work.num_pieces, "PIECE_COLUMNS": work.piece_columns}
    in_groups = {"NUM_GROUPS": num_groups, "GROUP": GROUP}
    _groups_of_piece[work.pieces](
        work.logits, temperature, min_p, largest, group_keys, masses,
        work.num_rows, work.row_stride, **work.cut, **pieces, **in_groups,
    )  # fmt: skip
    _cut_of_row[(work.num_rows,)](
        work.logits, temperature, min_p, top_k, top_p, largest, masses, group_keys, groups,
        keys, tokens, work.row_stride,
        VOCAB=work.vocab_size, **pieces, **in_groups, GROUP_COLUMNS=power_of_two(num_groups),
        COLUMNS=columns, num_warps=min(CUT.warps, max(4, columns // 512)),
        enable_fp_fusion=False,
    )  # fmt: skip
    return keys, tokens
