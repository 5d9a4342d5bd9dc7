"""A decoder as a fused forward pass takes it: each layer's weights, sizes and caches, as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
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


class Stops(IntEnum):
    """Where a forward pass stops and asks its watcher, before a layer's experts run."""

    NEVER = 0
    MISSING = 1  # where an expert that is needed is not resident
    ALWAYS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """What a device's experts are given: who serves may have some of them run elsewhere.

    rows: [num_rows, hidden_size]; row_of_pair: int64 [num_pairs], pairs sorted by expert; out:
    [num_pairs, hidden_size], for the results.
    """

    rows: Tensor
    row_of_pair: Tensor
    out: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopped:
    """What a forward pass shows at a layer's experts. Arrays are valid until it goes on.

    expert_ids: int64 [num_tokens, top_k]; weights: float32, alike; counts: int64 [num_experts], how
    many pairs each expert has; residual: [num_tokens, hidden_size], what entered the norm before
    the router, in the model's dtype. pairs: where some experts may be run elsewhere; then no `Run`
    names those, and their results are in `pairs.out` for what the kernels' stream does after the
    last one, which may name none.
    """

    layer: int
    expert_ids: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    counts: np.ndarray[Any, Any]
    residual: Tensor
    pairs: Pairs | None = None


class Arrivals(Protocol):
    """Experts of a stopped pass that are on their way, for the native side to wait for.

    address: of the structure that it takes.
    """

    @property
    def address(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Run:
    """What a stopped pass, or a layer, is to run.

    only: uint8 [num_experts], experts that can run now, or None for all. arrivals: others, each to
    run as soon as it is there; a fused pass comes back when all were run, or one has failed.
    is_last: afterwards, unless one has failed, every expert of the layer that has pairs was run.
    """

    only: Tensor | None
    is_last: bool
    arrivals: Arrivals | None = None


class Forward(Protocol):
    """One model's whole forward pass; see `cpu.Forward`."""

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Sequence[Tensor],
        plans: Sequence[Any],
        watcher: Watcher | None = None,
    ) -> Tensor: ...


class Watcher(Protocol):
    """Who sees which experts a step uses, and brings in what is missing.

    ids, weights: int64 and float32 [num_layers, num_tokens, top_k], in which the pass notes every
    router's choice (layers as the model counts them), or None. is_forced: it takes what is in them
    instead: studies replay routing that was recorded.
    """

    @property
    def is_forced(self) -> bool: ...

    @property
    def stops(self) -> Stops: ...
    @property
    def ids(self) -> Tensor | None: ...
    @property
    def weights(self) -> Tensor | None: ...

    def serve(self, stopped: Stopped, can_wait: bool = True) -> Iterator[Run]:
        """Yield what to run: together all experts that have pairs, each once (but see `Stopped`).

        The last one says so; it is asked for more all the same, when the pass has gone on.
        can_wait: whether there may be `arrivals`. What it raises ends the forward pass.
        """
        ...
