"""A decoder as a fused forward pass takes it: each layer's weights, sizes and caches, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.kernels.rope.base import Heads
from moe_serve.types import RouterRecipe


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPart:
    """A weight as the kernels packed it, and its bias."""

    weight: Any
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MoePart:
    """A layer's router and experts."""

    router: LinearPart
    recipe: RouterRecipe
    selection_bias: Tensor | None
    experts: ExpertTable
    shared_gate: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPart:
    """One decoder layer. gate_up, down: its dense MLP, or its shared expert, or None."""

    attention_norm: Tensor
    qkv: LinearPart
    heads: Heads
    output: LinearPart
    scale: float
    key_cache: Tensor
    value_cache: Tensor
    group: int
    mlp_norm: Tensor
    gate_up: LinearPart | None
    down: LinearPart | None
    moe: MoePart | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """A decoder, as its kernels see it. embedding: a plain table, or a packed head."""

    layers: Sequence[LayerPart]
    embedding: Any
    norm: Tensor
    norm_eps: float
