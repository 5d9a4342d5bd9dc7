"""From a router's logits to experts and weights on a GPU; order and ties as in reference.py.

`route` is one kernel: a program has a few tokens, one warp each, whose experts' scores stay in
registers; the best are found by as many turns as there are to choose. `sort_pairs` counts: each
pair's place is the number of pairs that come before it.
"""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu.triton import aligned, ordered, widened

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.gpu.row_tiles import (
    NORM,
    ROUTE,
    SORT_FEW,
    SORT_MANY,
    first_that_holds,
    power_of_two,
    whole_rows,
)
from moe_serve.types import RouterRecipe, Routing

# chunks of pairs whose counts an expert's program scans, at least
_LEAST_CHUNKS = 1024

_LOWEST: tl.constexpr = tl.constexpr(-(2**31))
_HIGHEST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _log_1_plus(x):
    """Return log(1 + x) for x in 0 .. 1, never negative: the series of the inverse of tanh."""
    ratio = x / (x + 2.0)  # at most 1/3
    square = ratio * ratio
    series = 2.0 / 15.0
    series = series * square + 2.0 / 13.0
    series = series * square + 2.0 / 11.0
    series = series * square + 2.0 / 9.0
    series = series * square + 2.0 / 7.0
    series = series * square + 2.0 / 5.0
    series = series * square + 2.0 / 3.0
    return series * square * ratio + (ratio + ratio)


@triton.jit
def _softmax(values, is_there):
    """Return the softmax of each row over where `is_there`; elsewhere 0."""
    most = tl.max(tl.where(is_there, values, -float("inf")), 1)
    powers = tl.where(is_there, tl.exp(values - most[:, None]), 0.0)
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _ranks(keys, places, COUNT: tl.constexpr):
    """Rank the COUNT largest keys of each row from 0, ties to the lower place; others are COUNT.

    keys, places: int32 [rows, columns]; a key of -2**31 is never ranked, unless all are.
    """
    ranks = tl.zeros_like(keys) + COUNT
    for turn in range(COUNT):
        most = tl.max(keys, 1)
        is_most = keys == most[:, None]
        first = tl.min(tl.where(is_most, places, _HIGHEST), 1)
        is_next = is_most & (places == first[:, None])
        ranks = tl.where(is_next, turn, ranks)
        keys = tl.where(is_next, _LOWEST, keys)
    return ranks


@triton.jit
def _kept_groups(
    choice, is_there, ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SCORE_TOP: tl.constexpr,
):  # fmt: skip
    """Return whether each expert is in one of its token's best groups: bool, like `choice`."""
    in_groups = tl.reshape(choice, [ROWS * GROUPS, GROUP_SIZE])
    keys = tl.where(tl.reshape(is_there, [ROWS * GROUPS, GROUP_SIZE]), ordered(in_groups), _LOWEST)
    member = tl.arange(0, GROUP_SIZE)[None, :] + tl.zeros_like(keys)
    ranks = _ranks(keys, member, SCORE_TOP)
    sums = tl.sum(tl.where(ranks < SCORE_TOP, in_groups, 0.0), 1)
    sums = tl.reshape(sums, [ROWS, GROUPS])
    group = tl.arange(0, GROUPS)[None, :] + tl.zeros([ROWS, GROUPS], tl.int32)
    group_ranks = _ranks(tl.where(group < NUM_GROUPS, ordered(sums), _LOWEST), group, TOP_GROUPS)
    ranks = tl.reshape(group_ranks, [ROWS * GROUPS])[:, None] + tl.zeros_like(keys)
    return tl.reshape(ranks, [ROWS, GROUPS * GROUP_SIZE]) < TOP_GROUPS


@triton.jit(do_not_specialize=["num_tokens"])
def _route(
    logits, selection_bias, ids, weights, num_tokens,
    SCORE: tl.constexpr, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr, SCORE_TOP: tl.constexpr, RENORMALISE: tl.constexpr,
    RENORMALISE_EPS: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """Route some tokens. A token's columns are groups of GROUP_SIZE, of which the first hold."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, GROUPS * GROUP_SIZE)[None, :]
    MEMBERS: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    if GROUPS == 1:
        expert = column
        is_expert = column < NUM_EXPERTS
    else:
        member = column % GROUP_SIZE
        expert = column // GROUP_SIZE * MEMBERS + member
        is_expert = (member < MEMBERS) & (column < NUM_GROUPS * GROUP_SIZE)
    is_there = is_expert & (token < num_tokens)
    scores = tl.load(logits + token * NUM_EXPERTS + expert, mask=is_there, other=0.0)
    # all of the tile, also for a token that is not there
    is_expert = is_expert & (token >= 0)
    if SCORE == "softmax":
        scores = _softmax(scores, is_expert)
    elif SCORE == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    elif SCORE == "sqrt_softplus":
        softplus = tl.maximum(scores, 0.0) + _log_1_plus(tl.exp(-tl.abs(scores)))
        scores = tl.sqrt(softplus)

    choice = scores
    if selection_bias is not None:
        choice += tl.load(selection_bias + expert, mask=is_expert, other=0.0)
    if TOP_GROUPS < NUM_GROUPS:
        is_kept = _kept_groups(
            choice, is_expert, ROWS, GROUPS, GROUP_SIZE, NUM_GROUPS, TOP_GROUPS, SCORE_TOP
        )
        choice = tl.where(is_kept, choice, -float("inf"))
    experts = expert + tl.zeros_like(choice).to(tl.int32)
    ranks = _ranks(tl.where(is_expert, ordered(choice), _LOWEST), experts, TOP_K)

    is_chosen = ranks < TOP_K
    if SCORE == "softmax_after_top_k":
        scores = _softmax(scores, is_chosen)
    if selection_bias is not None or TOP_GROUPS < NUM_GROUPS:
        # a bias may choose in another order than the weights have
        ranks = _ranks(tl.where(is_chosen, ordered(scores), _LOWEST), ranks, TOP_K)
    if RENORMALISE:
        sums = tl.sum(tl.where(is_chosen, scores, 0.0), 1)
        scores = scores / (sums[:, None] + RENORMALISE_EPS)
    if SCALE != 1.0:
        scores = scores * SCALE
    at = token * TOP_K + ranks
    is_chosen = is_chosen & (token < num_tokens)
    tl.store(ids + at, experts.to(tl.int64), mask=is_chosen)
    tl.store(weights + at, scores, mask=is_chosen)


def route(logits: Tensor, recipe: RouterRecipe, selection_bias: Tensor | None = None) -> Routing:
    """Do what reference.py's `route` does."""
    num_tokens, num_experts = logits.shape
    assert recipe.top_k <= num_experts == recipe.num_experts, (logits.shape, recipe)
    is_grouped = recipe.top_k_groups < recipe.num_groups
    num_groups = recipe.num_groups if is_grouped else 1
    groups = power_of_two(num_groups)
    members = num_experts // num_groups
    group_size = power_of_two(members)
    tiles = whole_rows(ROUTE, groups * group_size)
    shape = num_tokens, recipe.top_k
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if num_tokens:
        _route[(triton.cdiv(num_tokens, tiles.rows),)](
            aligned(logits),
            None if selection_bias is None else aligned(selection_bias),
            ids, weights, num_tokens,
            SCORE=recipe.score, NUM_EXPERTS=num_experts, TOP_K=recipe.top_k,
            NUM_GROUPS=num_groups, TOP_GROUPS=min(recipe.top_k_groups, num_groups),
            SCORE_TOP=min(recipe.group_score_top, members), RENORMALISE=recipe.renormalise,
            RENORMALISE_EPS=recipe.renormalise_eps, SCALE=recipe.scale,
            ROWS=tiles.rows, GROUPS=groups, GROUP_SIZE=group_size, num_warps=tiles.warps,
        )  # fmt: skip
    return Routing(ids, weights)


@triton.jit
def _num_sorted(num_rows, num_pairs, TOP_K: tl.constexpr):
    """Return how many pairs are of rows that are no padding."""
    count = num_pairs
    if num_rows is not None:
        count = tl.minimum(num_pairs, tl.load(num_rows) * TOP_K)
    return count


@triton.jit(do_not_specialize=["num_pairs"])
def _sort_few(
    expert_ids, counts, row_of_pair, pair_of_choice, num_rows, num_pairs,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Place the pairs of one expert; PAIRS holds all that there are."""
    expert = tl.program_id(0)
    pair = tl.arange(0, PAIRS)
    is_there = pair < _num_sorted(num_rows, num_pairs, TOP_K)
    ids = tl.load(expert_ids + pair, mask=is_there, other=0)
    is_mine = (is_there & (ids == expert)).to(tl.int32)
    first = tl.sum((is_there & (ids < expert)).to(tl.int32), 0)
    place = first + tl.cumsum(is_mine, 0) - 1
    tl.store(counts + expert, tl.sum(is_mine, 0).to(tl.int64))
    tl.store(row_of_pair + place, (pair // TOP_K).to(tl.int64), mask=is_mine > 0)
    is_padding = (pair < num_pairs) & ~is_there & (expert == 0)
    tl.store(
        pair_of_choice + pair,
        tl.where(is_padding, 0, place).to(tl.int64),
        mask=(is_mine > 0) | is_padding,
    )


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def _count(
    expert_ids, own, lower, num_rows, num_pairs, num_chunks,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Count a chunk's pairs of each expert (`own`), and of all before it: [experts, chunks]."""
    chunk = tl.program_id(0)
    pair = chunk * PAIRS + tl.arange(0, PAIRS)
    is_there = pair < _num_sorted(num_rows, num_pairs, TOP_K)
    ids = tl.load(expert_ids + pair, mask=is_there, other=0).to(tl.int32)
    found = tl.histogram(ids, EXPERTS, mask=is_there)
    expert = tl.arange(0, EXPERTS)
    at = expert * num_chunks + chunk
    tl.store(own + at, found, mask=expert < NUM_EXPERTS)
    tl.store(lower + at, tl.cumsum(found, 0) - found, mask=expert < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_chunks"])
def _scan(own, lower, counts, num_chunks, CHUNKS: tl.constexpr):
    """Turn one expert's `own` into the place of its first pair of each chunk."""
    expert = tl.program_id(0)
    own += expert * num_chunks
    lower += expert * num_chunks
    chunk = tl.arange(0, CHUNKS)
    is_there = chunk < num_chunks
    found = tl.load(own + chunk, mask=is_there, other=0)
    first = tl.sum(tl.load(lower + chunk, mask=is_there, other=0), 0)
    tl.store(own + chunk, first + tl.cumsum(found, 0) - found, mask=is_there)
    tl.store(counts + expert, tl.sum(found, 0).to(tl.int64))


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def _place(
    expert_ids, firsts, row_of_pair, pair_of_choice, num_rows, num_pairs, num_chunks,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Place a chunk's pairs: each after those of its expert that come before it."""
    chunk = tl.program_id(0)
    index = tl.arange(0, PAIRS)
    pair = chunk * PAIRS + index
    count = _num_sorted(num_rows, num_pairs, TOP_K)
    is_there = pair < count
    ids = tl.load(expert_ids + pair, mask=is_there, other=-1).to(tl.int32)
    first = tl.load(firsts + ids * num_chunks + chunk, mask=is_there, other=0)
    other = chunk * PAIRS + tl.arange(0, PAIRS)[:, None]
    other_ids = tl.load(expert_ids + other, mask=other < count, other=-1).to(tl.int32)
    is_before = (other_ids == ids[None, :]) & (other < pair[None, :])
    # a thread has a column: it adds up by itself
    place = (first + tl.sum(is_before.to(tl.int32), 0)).to(tl.int64)
    tl.store(row_of_pair + place, (pair // TOP_K).to(tl.int64), mask=is_there)
    place = tl.where(is_there, place, 0)
    tl.store(pair_of_choice + pair, place, mask=pair < num_pairs)


def sort_pairs(
    expert_ids: Tensor, num_experts: int, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what reference.py's `sort_pairs` does; there must be fewer than 2**31 pairs.

    num_rows is on the device. Behind the pairs of its rows, row_of_pair is left unwritten.
    """
    expert_ids = expert_ids.contiguous()
    num_pairs, top_k = expert_ids.numel(), expert_ids.shape[1]
    device = expert_ids.device
    counts = torch.empty(num_experts, dtype=torch.int64, device=device)
    row_of_pair = torch.empty(num_pairs, dtype=torch.int64, device=device)
    pair_of_choice = torch.empty(expert_ids.shape, dtype=torch.int64, device=device)
    if num_pairs <= SORT_FEW[-1].columns:
        tiles = first_that_holds(SORT_FEW, num_pairs)
        _sort_few[(num_experts,)](
            expert_ids, counts, row_of_pair, pair_of_choice, num_rows, num_pairs,
            TOP_K=top_k, PAIRS=tiles.columns, num_warps=tiles.warps,
        )  # fmt: skip
        return counts, row_of_pair, pair_of_choice
    tiles = SORT_MANY
    num_chunks = triton.cdiv(num_pairs, tiles.columns)
    shape = num_experts, num_chunks
    own, lower = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    _count[(num_chunks,)](
        expert_ids, own, lower, num_rows, num_pairs, num_chunks,
        NUM_EXPERTS=num_experts, EXPERTS=max(32, power_of_two(num_experts)), TOP_K=top_k,
        PAIRS=tiles.columns,
    )  # fmt: skip
    _scan[(num_experts,)](
        own, lower, counts, num_chunks, CHUNKS=max(_LEAST_CHUNKS, power_of_two(num_chunks))
    )
    _place[(num_chunks,)](
        expert_ids, own, row_of_pair, pair_of_choice, num_rows, num_pairs, num_chunks,
        TOP_K=top_k, PAIRS=tiles.columns, num_warps=tiles.warps,
    )  # fmt: skip
    return counts, row_of_pair, pair_of_choice


@triton.jit(do_not_specialize=["num_rows"])
def _shared_weights(
    hidden, gate, out, num_rows, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_there = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    at = row[:, None] * SIZE + column[None, :]
    wide = widened(tl.load(hidden + at, mask=is_there, other=0.0))
    factors = tl.load(gate + column, mask=column < SIZE, other=0.0)
    sums = tl.sum(wide * factors[None, :], 1)
    tl.store(out + row, 1.0 / (1.0 + tl.exp(-sums)), mask=row < num_rows)


def shared_weights(hidden: Tensor, gate: Tensor) -> Tensor:
    """Do what reference.py's `shared_weights` does."""
    num_rows, size = hidden.shape
    assert gate.shape == (size,), (gate.shape, size)
    out = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    tiles = whole_rows(NORM, size)
    if num_rows:
        _shared_weights[(triton.cdiv(num_rows, tiles.rows),)](
            aligned(hidden), aligned(gate), out, num_rows,
            SIZE=size, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.warps,
        )  # fmt: skip
    return out
