"""Rows to and from the form in which they travel, by the native library; as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.kernels.exchange.base import Packed, Replicas, RowPlan, Unpacked, row_bytes
from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.pointers import empty, pointer, pointer_or_null


class ExchangeKernels:
    """`pack_rows`, `unpack_rows` and `scatter_rows`, as reference.py has them."""

    def __init__(self, native: Native) -> None:
        self._pack_rows = native.function("pack_rows", "llllplpllplppppp")
        self._unpack_rows = native.function("unpack_rows", "pllllpllpppppp", "i")
        self._scatter_rows = native.function("scatter_rows", "pllppl", "i")

    def pack_rows(
        self, hidden: Tensor, expert_ids: Tensor, replicas: Replicas, plan: RowPlan, out: Tensor
    ) -> Packed:
        num_tokens, top_k = expert_ids.shape
        num_ranks, capacity = plan.num_ranks, plan.capacity
        hidden, expert_ids = hidden.contiguous(), expert_ids.contiguous()
        assert hidden.shape[0] == num_tokens, (hidden.shape, expert_ids.shape)
        assert capacity is None or num_tokens <= plan.rounds * capacity, (num_tokens, plan)
        wanted = plan.num_rows(num_tokens, top_k), row_bytes(hidden.shape[1], hidden.dtype, top_k)
        assert out.shape == wanted, (out.shape, wanted)
        places = empty(num_tokens, top_k, dtype=torch.int64)
        of_ranks = empty(2, num_ranks, dtype=torch.int64)
        rows_of_rank, pairs_of_rank = of_ranks.unbind()
        self._pack_rows(
            num_ranks,
            -1 if capacity is None else capacity,
            plan.rounds,
            -1 if plan.width is None else plan.width,
            pointer(hidden, hidden.dtype),
            hidden.shape[1] * hidden.element_size(),
            pointer(expert_ids, torch.int64),
            num_tokens,
            top_k,
            pointer(replicas.ranks, torch.int64),
            replicas.ranks.shape[1],
            pointer(replicas.counts, torch.int64),
            pointer(out, torch.uint8),
            places.data_ptr(),
            rows_of_rank.data_ptr(),
            pairs_of_rank.data_ptr(),
        )
        return Packed(places, rows_of_rank, pairs_of_rank)

    def unpack_rows(
        self,
        packed: Tensor,
        rows_of_rank: Tensor | None,
        num_experts: int,
        top_k: int,
        plan: RowPlan,
        out: Tensor,
    ) -> Unpacked:
        num_rows, hidden_size = out.shape
        wanted = num_rows, row_bytes(hidden_size, out.dtype, top_k)
        assert packed.shape == wanted, (packed.shape, wanted)
        counts = empty(num_experts, dtype=torch.int64)
        pairs = empty(2, num_rows * top_k, dtype=torch.int64)
        # and two more: how many rows and pairs there are
        of_ranks = empty(plan.num_ranks + 2, dtype=torch.int64)
        failed = self._unpack_rows(
            pointer(packed, torch.uint8),
            num_rows,
            hidden_size * out.element_size(),
            top_k,
            num_experts,
            pointer_or_null(rows_of_rank, torch.int64),
            plan.num_ranks,
            -1 if plan.width is None else plan.width,
            pointer(out, out.dtype),
            counts.data_ptr(),
            pairs.data_ptr(),
            pairs.data_ptr() + num_rows * top_k * pairs.element_size(),
            of_ranks.data_ptr(),
            of_ranks.data_ptr() + plan.num_ranks * of_ranks.element_size(),
        )
        if failed:
            raise ValueError(f"a rank names an expert that is not one of {num_experts}")
        used, num_pairs = of_ranks[plan.num_ranks :].tolist()
        row_of_pair, place_of_pair = pairs[:, :num_pairs].unbind()
        pairs_of_rank = of_ranks[: plan.num_ranks]
        return Unpacked(out[:used], row_of_pair, place_of_pair, counts, pairs_of_rank)

    def scatter_rows(self, rows: Tensor, places: Tensor, out: Tensor) -> None:
        rows = rows.contiguous()
        assert rows.shape[1:] == out.shape[1:], (rows.shape, out.shape)
        assert places.shape == rows.shape[:1], (places.shape, rows.shape)
        if self._scatter_rows(
            pointer(rows, out.dtype),
            rows.shape[0],
            rows.shape[1] * rows.element_size(),
            pointer(places, torch.int64),
            pointer(out, out.dtype),
            out.shape[0],
        ):
            raise IndexError(f"a place is not one of {out.shape[0]}")
