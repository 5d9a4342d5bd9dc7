"""Routing by the native library; numbers as in reference.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.pointers import dtype_code, empty, pointer, pointer_or_null
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
            pointer_or_null(selection_bias, torch.float32),
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
        assert recipe.top_k <= recipe.num_experts, recipe
        assert logits.shape == (num_tokens, recipe.num_experts), (logits.shape, recipe)
        ids = empty(num_tokens, recipe.top_k, dtype=torch.int64)
        weights = empty(num_tokens, recipe.top_k, dtype=torch.float32)
        self._route(
            torch.get_num_threads(),
            ctypes.addressof(arguments),
            pointer(logits, torch.float32),
            num_tokens,
            ids.data_ptr(),
            weights.data_ptr(),
        )
        return Routing(ids, weights)

    def sort_pairs(self, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, top_k = expert_ids.shape
        expert_ids = expert_ids.contiguous()
        counts = empty(num_experts, dtype=torch.int64)
        row_of_pair = empty(num_tokens * top_k, dtype=torch.int64)
        pair_of_choice = empty(num_tokens, top_k, dtype=torch.int64)
        self._sort_pairs(
            pointer(expert_ids, torch.int64),
            num_tokens,
            top_k,
            num_experts,
            counts.data_ptr(),
            row_of_pair.data_ptr(),
            pair_of_choice.data_ptr(),
        )
        return counts, row_of_pair, pair_of_choice

    def shared_weights(self, hidden: Tensor, gate: Tensor) -> Tensor:
        hidden, gate = hidden.contiguous(), gate.contiguous()
        assert gate.shape == hidden.shape[1:], (gate.shape, hidden.shape)
        out = empty(hidden.shape[0], dtype=torch.float32)
        self._shared_weights(
            torch.get_num_threads(),
            dtype_code(hidden.dtype),
            pointer(hidden, hidden.dtype),
            pointer(gate, torch.float32),
            hidden.shape[0],
            hidden.shape[1],
            out.data_ptr(),
        )
        return out
