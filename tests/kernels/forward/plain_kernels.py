"""Kernels in plain torch that never wait for the device, and whose rows do not see one another.

They take what a GPU's kernels take: plans of attention/decode with bounds, rows of padding, experts
without a slot. What a GPU leaves unwritten is NaN, or no index.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_serve.kernels import suite
from moe_serve.kernels.gpu import attention_plan
from moe_serve.kernels.gpu.attention_plan import Part, Plan
from moe_serve.kernels.moe.base import ExpertTable, plain_weights
from moe_serve.kernels.paged_attention import reference as attention_reference
from moe_serve.kernels.paged_attention.reference import PIECE, Tile, _tile
from moe_serve.kernels.rope import reference as rope_reference
from moe_serve.kernels.rope.base import Heads

UNWRITTEN = -(2**40)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = (rows.float()[:, None] * weight.float()).sum(-1).to(weight.dtype)
    return out if bias is None else out + bias


def sort_pairs(
    expert_ids: Tensor, num_experts: int, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    ids = expert_ids
    is_padding = torch.zeros(len(ids), 1, dtype=torch.bool)
    if num_rows is not None:
        is_padding = (torch.arange(len(ids)) >= num_rows)[:, None]
        ids = ids.masked_fill(is_padding, num_experts)
    flat = ids.flatten()
    order = torch.sort(flat, stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    counts = (flat[:, None] == torch.arange(num_experts)).sum(0)
    is_unwritten = torch.arange(len(order)) >= counts.sum()
    row_of_pair = (order // ids.shape[1]).masked_fill(is_unwritten, UNWRITTEN)
    return counts, row_of_pair, places.view_as(ids).masked_fill(is_padding, 0)


def moe(
    hidden: Tensor,
    row_of_pair: Tensor,
    counts: Tensor,
    experts: ExpertTable,
    only: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        out = hidden.new_full((len(row_of_pair), hidden.shape[1]), float("nan"))
    is_run = experts.slot_of_expert >= 0
    if only is not None:
        is_run = is_run & (only != 0)
    experts.uses.add_(torch.where(is_run, counts, 0))
    pair = torch.arange(len(row_of_pair))
    expert = torch.searchsorted(counts.cumsum(0), pair, right=True)  # num_experts: of padding
    is_pair = expert < len(counts)
    expert = expert.clamp_max(len(counts) - 1)
    is_pair = is_pair & is_run[expert]
    slot = experts.slot_of_expert[expert].clamp_min(0)
    gate_up, down = plain_weights(
        experts.records, experts.hidden_size, experts.intermediate_size, experts.dtype
    )
    rows = hidden[torch.where(is_pair, row_of_pair, 0)].float()
    both = (rows[:, None] * gate_up[slot].float()).sum(-1).to(hidden.dtype)
    inner = KERNELS.silu_and_mul(both).float()
    found = (inner[:, None] * down[slot].float()).sum(-1).to(hidden.dtype)
    return out.copy_(torch.where(is_pair[:, None], found, out))


def rope_write_kv(
    qkv: Tensor,
    heads: Heads,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    kept = key_cache[:, 0].clone(), value_cache[:, 0].clone()
    query = rope_reference.rope_write_kv(
        qkv, heads, positions, slots.clamp_min(0), key_cache, value_cache
    )
    key_cache[:, 0], value_cache[:, 0] = kept  # of the null block: nobody's but padding's
    return query


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Plan, scale: float
) -> Tensor:
    tiles = [tile for part in plan.parts for tile in _tiles(part, plan)]
    return attention_reference.paged_attention(query, key_cache, value_cache, tiles, scale)


def _tiles(part: Part, plan: Plan) -> list[Tile]:
    if part.items is not None:
        table = plan.block_table
        columns = zip(*part.items.tolist(), part.contexts.tolist(), strict=True)
        return [
            replace(tile, rows=tile.rows + first)
            for row, first, length, context in columns
            for tile in attention_reference.plan(
                (length,), (context,), table[row : row + 1], plan.block_size, plan.window
            )
        ]
    rows = torch.arange(len(part.contexts))
    most = part.max_context if plan.window is None else min(part.max_context, plan.window + PIECE)
    pieces = -(-most // PIECE) + (plan.window is not None)
    positions = part.contexts.long() - 1
    table, window = plan.block_table, plan.window
    return [_tile(rows, rows, positions, 1, pieces, table, plan.block_size, window)]


KERNELS = replace(
    suite.load("reference"),
    linear=linear,
    sort_pairs=sort_pairs,
    moe=moe,
    rope_write_kv=rope_write_kv,
    plan_attention=attention_plan.plan,
    paged_attention=paged_attention,
)
