"""What a model is, as data: the one decoder (`decoder.py`) reads it, the loader fills it.

Each `models/<model_type>.py` turns a Hugging Face config into a `ModelSpec`. Nothing here computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moe_serve.layers.rope import RopeSpec
from moe_serve.types import CacheGroup, RouterRecipe


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeSpec:
    """A layer's experts. shared_intermediate_size 0: no shared expert."""

    router: RouterRecipe
    intermediate_size: int
    shared_intermediate_size: int = 0
    has_shared_gate: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Grouped-query attention. qk_norm "head": over each head; "full": over all heads at once."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    qkv_clip: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One decoder layer: a window (None: full attention), and experts or one dense MLP."""

    window: int | None = None
    moe: MoeSpec | None = None
    mlp_intermediate_size: int = 0
    has_mlp_bias: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the checkpoint, its shape there, and where its box begins in our tensor.

    start: as long as the target's shape; see `WeightSpec.layouts`.
    """

    source: str
    shape: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One tensor as the decoder wants it, and the ways a checkpoint may hold it.

    layouts: alternatives, the first whose sources are all there is read. Each is a tuple of parts
        that together fill `shape` exactly. A part's box begins at `start` (as long as `shape`);
        when the part has fewer dimensions than the target its box is 1 wide in the leading ones.
    is_fp32: held in float32 whatever the model's dtype (routers, biases for selection).
    """

    name: str
    shape: tuple[int, ...]
    layouts: tuple[tuple[Part, ...], ...]
    is_fp32: bool = False

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder, entire. weights: every tensor it needs; tied embeddings appear once."""

    model_type: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    norm_eps: float
    attention: AttentionSpec
    layers: tuple[LayerSpec, ...]
    is_embedding_tied: bool
    weights: tuple[WeightSpec, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def cache_groups(self, bytes_per_element: int) -> tuple[CacheGroup, ...]:
        """Group the layers by how their keys and values are kept, in order of first use."""
        per_layer = 2 * self.attention.num_kv_heads * self.attention.head_dim * bytes_per_element
        members: dict[int | None, list[int]] = {}
        for index, layer in enumerate(self.layers):
            members.setdefault(layer.window, []).append(index)
        return tuple(
            CacheGroup(
                kind="full" if window is None else "sliding",
                layers=tuple(layers),
                bytes_per_token=per_layer * len(layers),
                window=window,
            )
            for window, layers in members.items()
        )
