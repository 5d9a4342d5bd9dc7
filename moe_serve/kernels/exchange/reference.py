"""Rows to and from the form in which they travel between ranks, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.kernels.exchange.base import NAME, Packed, Replicas, RowPlan, Unpacked


def pack_rows(
    hidden: Tensor, expert_ids: Tensor, replicas: Replicas, plan: RowPlan, out: Tensor
) -> Packed:
    """Write the rows that go to each rank to `out`, as `plan` says.

    hidden: [num_tokens, hidden_size]; expert_ids: int64 [num_tokens, top_k], a token's all
    different; out: uint8 [plan.num_rows, row_bytes]. Of a slot without experts only the names are
    written.
    """
    num_tokens = expert_ids.shape[0]
    size = hidden.shape[1] * hidden.element_size()
    token = torch.arange(num_tokens)
    ranks = replicas.ranks[expert_ids, token[:, None] % replicas.counts[expert_ids]]
    is_there = ranks == torch.arange(plan.num_ranks)[:, None, None]  # [num_ranks, tokens, top_k]
    rank_of_row, token_of_row = is_there.any(2).nonzero(as_tuple=True)  # those that are needed
    experts = torch.where(is_there, expert_ids, -1)[rank_of_row, token_of_row]
    if plan.capacity is None:
        row = torch.arange(len(token_of_row))
        rows_of_rank = rank_of_row.bincount(minlength=plan.num_ranks)
    else:
        assert num_tokens <= plan.rounds * plan.capacity, (num_tokens, plan)
        group = token_of_row // max(1, plan.capacity) * plan.num_ranks + rank_of_row
        row = group * plan.capacity + token_of_row % max(1, plan.capacity)
        rows_of_rank = torch.full((plan.num_ranks,), plan.rounds * plan.capacity)
        out[:, size:].view(NAME).fill_(-1)
    out[row, :size] = hidden[token_of_row].contiguous().view(torch.uint8)
    names = torch.empty(experts.shape, dtype=NAME).copy_(experts)  # packed, also of no row
    out[row, size:] = names.view(torch.uint8)
    pairs_of_rank = ranks.flatten().bincount(minlength=plan.num_ranks)
    if plan.width is None:
        order = ranks.flatten().argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        return Packed(places.view_as(ranks), rows_of_rank, pairs_of_rank)
    row_at = torch.full((plan.num_ranks, num_tokens), -1)
    row_at[rank_of_row, token_of_row] = row
    turn = (is_there.cumsum(2) - 1).gather(0, ranks[None])[0]  # of a token's choices at that rank
    places = row_at[ranks, token[:, None]] * plan.width + turn
    return Packed(places, rows_of_rank, pairs_of_rank)


def unpack_rows(
    packed: Tensor,
    rows_of_rank: Tensor | None,
    num_experts: int,
    top_k: int,
    plan: RowPlan,
    out: Tensor,
) -> Unpacked:
    """Take rows apart that came from all ranks.

    packed: uint8 [num_rows, row_bytes]; rows_of_rank: int64 [num_ranks], how many came from each,
    in order; None where they lie in slots, and then `pairs_of_rank` is of no use. out: like the
    rows, [num_rows, hidden_size], of which `rows` is the beginning. Raises ValueError where an
    expert is named that the layer does not have.
    """
    size = out.shape[1] * out.element_size()
    experts = packed[:, size:].reshape(-1).view(NAME).view(-1, top_k).long()
    if bool((experts >= num_experts).any()):
        raise ValueError(f"a rank names expert {int(experts.max())} of {num_experts}")
    is_here = experts >= 0
    is_used = is_here.any(1)
    rows = out[: int(is_used.sum())]
    rows.copy_(packed[is_used, :size].view(out.dtype))
    row, choice = is_here.nonzero(as_tuple=True)
    expert = experts[row, choice]
    order = expert.argsort(stable=True)
    if plan.width is None:
        places = order
    else:
        places = (row * plan.width + (is_here.cumsum(1) - 1)[is_here])[order]
    pairs_of_rank = torch.zeros(plan.num_ranks, dtype=torch.int64)
    if rows_of_rank is not None:
        rank_of_row = torch.arange(plan.num_ranks).repeat_interleave(rows_of_rank)
        pairs_of_rank.index_add_(0, rank_of_row, is_here.sum(1))
    row_of_pair = (is_used.cumsum(0) - 1)[row[order]]
    counts = expert.bincount(minlength=num_experts)
    return Unpacked(rows, row_of_pair, places, counts, pairs_of_rank)


def scatter_rows(rows: Tensor, places: Tensor, out: Tensor) -> None:
    """Write `rows`, [num_rows, size], to out[places]; places: int64 [num_rows].

    Raises IndexError for a place that is not in `out`.
    """
    out[places] = rows
