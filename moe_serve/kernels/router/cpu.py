"""Routing by the native library; numbers as in reference.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_serve.kernels.native.library import DTYPE_CODES, Native
from moe_serve.types import RouterRecipe, RouterScore, Routing

_SCORES: tuple[RouterScore, ...] = ("softmax", "sigmoid", "softmax_after_top_k", "sqrt_softplus")


class RouterArguments(ctypes.Structure):
    """See native/arguments.h."""

    _fields_ = (
        ("score", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("num_groups", ctypes.c_int32),
        ("top_k_groups", ctypes.c_int32),
        ("group_score_top", ctypes.c_int32),
        ("renormalise", ctypes.c_int32),
        ("renormalise_eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("selection_bias", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, recipe: RouterRecipe, selection_bias: Tensor | None) -> RouterArguments:
        """Point to `selection_bias`, which must live on."""
        return cls(
            _SCORES.index(recipe.score),
            recipe.num_experts,
            recipe.top_k,
            recipe.num_groups,
            recipe.top_k_groups,
            recipe.group_score_top,
            recipe.renormalise,
            recipe.renormalise_eps,
            recipe.scale,
            None if selection_bias is None else selection_bias.data_ptr(),
        )


class RouterKernels:
    """`route`, `sort_pairs` and `shared_weights`, as reference.py has them."""

    def __init__(self, native: Native) -> None:
        self._route = native.function("route", "ipplpp")
        self._sort_pairs = native.function("sort_pairs", "plllppp")
        self._shared_weights = native.function("shared_weights", "iippllp")

    def route(
        self, logits: Tensor, recipe: RouterRecipe, selection_bias: Tensor | None = None
    ) -> Routing:
        num_tokens = logits.shape[0]
        logits = logits.contiguous()
        arguments = RouterArguments.of(recipe, selection_bias)
        ids = torch.empty(num_tokens, recipe.top_k, dtype=torch.int64)
        weights = torch.empty(num_tokens, recipe.top_k)
        self._route(
            torch.get_num_threads(),
            ctypes.addressof(arguments),
            logits.data_ptr(),
            num_tokens,
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return Routing(ids, weights)

    def sort_pairs(self, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, top_k = expert_ids.shape
        expert_ids = expert_ids.contiguous()
        counts = torch.empty(num_experts, dtype=torch.int64)
        row_of_pair = torch.empty(num_tokens * top_k, dtype=torch.int64)
        pair_of_choice = torch.empty(num_tokens, top_k, dtype=torch.int64)
        self._sort_pairs(
            expert_ids.data_ptr(),
            num_tokens,
            top_k,
            num_experts,
            counts.data_ptr(),
            row_of_pair.data_ptr(),
            pair_of_choice.data_ptr(),
        )
        return counts, row_of_pair, pair_of_choice

    def shared_weights(self, hidden: Tensor, gate: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        out = torch.empty(hidden.shape[0])
        self._shared_weights(
            torch.get_num_threads(),
            DTYPE_CODES[hidden.dtype],
            hidden.data_ptr(),
            gate.data_ptr(),
            hidden.shape[0],
            hidden.shape[1],
            out.data_ptr(),
        )
        return out
