"""The parts from which model files put a `ModelSpec` together: fields, layers, weight names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moe_serve.layers.rope import RopeSpec
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    Part,
    WeightSpec,
)
from moe_serve.types import RouterRecipe

# what Mistral and Qwen slide by when their config.json does not name sliding_window at all
DEFAULT_WINDOW = 4096

_MAX_SIZE = 2**24
_MAX_LAYERS = 4096
# experts of all layers together: each is a few lines of a plan, made before anything is read
_MAX_EXPERTS = 2**19


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeNames:
    """How a family calls its experts' tensors, below "model.layers.{layer}.".

    gate, up and down are below `experts`.{expert}; a fused file has `fused`.gate_up_proj and
    `fused`.down_proj instead.
    """

    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: str = "mlp.experts"


def attention(
    config: HFConfig,
    *,
    has_qkv_bias: bool = False,
    has_output_bias: bool = False,
    qk_norm: Literal["head", "full"] | None = None,
    qkv_clip: float | None = None,
    default_theta: float = 10000.0,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
) -> AttentionSpec:
    """Read the sizes of attention; what a family differs in is given.

    default_kv_heads: where num_key_value_heads is absent; where it is null, or this is None, there
        are as many as query heads. default_head_dim: None is hidden_size / query heads.
    """
    num_heads = config.integer("num_attention_heads", low=1, high=2**16)
    num_kv_heads = config.optional_integer("num_key_value_heads", low=1, high=2**16)
    if num_kv_heads is None:
        is_null = config.mentions("num_key_value_heads")
        num_kv_heads = num_heads if is_null or default_kv_heads is None else default_kv_heads
    if num_heads % num_kv_heads:
        raise config.error(
            "num_key_value_heads",
            f"is {num_kv_heads}; num_attention_heads {num_heads} must be a multiple",
        )
    hidden_size = config.integer("hidden_size", low=1, high=_MAX_SIZE)
    head_dim = config.optional_integer("head_dim", low=2, high=2**12)
    if head_dim is None:
        head_dim = default_head_dim
    if head_dim is None:
        if hidden_size % num_heads:
            raise config.error(
                "hidden_size",
                f"is {hidden_size}, no multiple of num_attention_heads {num_heads}; give head_dim",
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise config.error("head_dim", f"is {head_dim}; rotary embedding needs an even one")
    rope: RopeSpec = config.rope(default_theta)
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        has_qkv_bias=has_qkv_bias,
        has_output_bias=has_output_bias,
        qk_norm=qk_norm,
        qkv_clip=qkv_clip,
    )


def num_layers(config: HFConfig) -> int:
    return config.integer("num_hidden_layers", low=1, high=_MAX_LAYERS)


def windows(config: HFConfig, is_sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Return each layer's window: `sliding_window` where layer_types, or `is_sliding`, says so."""
    count = num_layers(config)
    window = _window(config, DEFAULT_WINDOW)
    kinds = config.layer_types(count, ("full_attention", "sliding_attention"))
    if kinds is None:
        slides = [is_sliding(layer) for layer in range(count)]
    else:
        slides = [kind == "sliding_attention" for kind in kinds]
    if any(slides) and not window:
        raise config.error(
            "sliding_window", "is not set, but there are layers with sliding attention"
        )
    return tuple(window if slide else None for slide in slides)


def windows_everywhere(config: HFConfig, default: int | None) -> tuple[int | None, ...]:
    """Return `sliding_window` for every layer; where it is null, or 0, there is none.

    default: where the field is absent.
    """
    return (_window(config, default),) * num_layers(config)


def _window(config: HFConfig, default: int | None) -> int | None:
    if not config.mentions("sliding_window"):
        return default
    return config.optional_integer("sliding_window") or None


def windows_above(config: HFConfig) -> tuple[int | None, ...]:
    """Return windows from layer `max_window_layers` on, where use_sliding_window is on (Qwen2)."""
    slides = config.boolean("use_sliding_window", default=False)
    border = config.integer("max_window_layers", low=0, default=28)
    if not slides:
        return (None,) * num_layers(config)
    return windows(config, lambda layer: layer >= border)


def dense_layers(
    config: HFConfig, layer_windows: tuple[int | None, ...], *, has_mlp_bias: bool = False
) -> tuple[LayerSpec, ...]:
    """Return layers with one MLP of `intermediate_size` each."""
    size = config.integer("intermediate_size", low=1, high=_MAX_SIZE)
    return tuple(
        LayerSpec(window=window, mlp_intermediate_size=size, has_mlp_bias=has_mlp_bias)
        for window in layer_windows
    )


def recipe(config: HFConfig, *, renormalise: bool) -> RouterRecipe:
    """Return softmax over all experts, then top-k: what the Qwen, OLMoE and Mixtral routers do."""
    num_experts = config.integer("num_experts", "num_local_experts", low=1, high=2**16)
    top_k = config.integer("num_experts_per_tok", low=1, high=2**16)
    if top_k > num_experts:
        raise config.error(
            "num_experts_per_tok", f"is {top_k}, but there are {num_experts} experts"
        )
    if num_experts * num_layers(config) > _MAX_EXPERTS:
        raise config.error(
            "num_experts",
            f"is {num_experts} in {num_layers(config)} layers; at most {_MAX_EXPERTS} together",
        )
    return RouterRecipe(num_experts=num_experts, top_k=top_k, renormalise=renormalise)


def sparse_layers(
    config: HFConfig, layer_windows: tuple[int | None, ...], moe: MoeSpec
) -> tuple[LayerSpec, ...]:
    """Return MoE layers, but dense ones where decoder_sparse_step or mlp_only_layers says so."""
    step = config.integer("decoder_sparse_step", low=1, high=_MAX_LAYERS, default=1)
    dense = set(config.integers("mlp_only_layers", low=0, high=_MAX_LAYERS, default=()))
    count = len(layer_windows)
    is_moe = [(layer + 1) % step == 0 and layer not in dense for layer in range(count)]
    size = 0
    if not all(is_moe):
        size = config.integer("intermediate_size", low=1, high=_MAX_SIZE)
    return tuple(
        LayerSpec(window=window, moe=moe)
        if sparse
        else LayerSpec(window=window, mlp_intermediate_size=size)
        for window, sparse in zip(layer_windows, is_moe, strict=True)
    )


def decoder(
    config: HFConfig,
    model_type: str,
    attention: AttentionSpec,
    layers: tuple[LayerSpec, ...],
    names: MoeNames | None = None,
    default_norm_eps: float = 1e-6,
) -> ModelSpec:
    """Put the spec together, with every weight and where a checkpoint has it."""
    config.refuse_quantised()
    config.string("hidden_act", choices=("silu",), default="silu")
    hidden_size = config.integer("hidden_size", low=1, high=_MAX_SIZE)
    vocab_size = config.integer("vocab_size", low=1, high=_MAX_SIZE)
    is_tied = config.boolean("tie_word_embeddings", default=False)
    weights = [whole("embedding", "model.embed_tokens.weight", vocab_size, hidden_size)]
    for index, layer in enumerate(layers):
        weights += _attention_weights(index, attention, hidden_size)
        if layer.moe is None:
            weights += _mlp_weights(
                f"layers.{index}.mlp", f"model.layers.{index}.mlp", layer.mlp_intermediate_size,
                hidden_size, has_bias=layer.has_mlp_bias,
            )  # fmt: skip
        else:
            assert names is not None
            weights += _moe_weights(index, layer.moe, names, hidden_size)
    weights.append(whole("norm", "model.norm.weight", hidden_size))
    if not is_tied:
        weights.append(whole("head", "lm_head.weight", vocab_size, hidden_size))
    return ModelSpec(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_position_embeddings=config.integer("max_position_embeddings", low=1),
        norm_eps=config.number("rms_norm_eps", low=0.0, high=1.0, default=default_norm_eps),
        attention=attention,
        layers=layers,
        is_embedding_tied=is_tied,
        weights=tuple(weights),
    )


def whole(name: str, source: str, *shape: int, is_fp32: bool = False) -> WeightSpec:
    """Return a weight that is one tensor of the checkpoint, of the same shape."""
    part = Part(source, shape, (0,) * len(shape))
    return WeightSpec(name=name, shape=shape, layouts=((part,),), is_fp32=is_fp32)


def stacked(name: str, sources: list[tuple[str, int]], *rest: int) -> WeightSpec:
    """Return a weight made of several, one below the other: (source, rows), each [rows, *rest]."""
    parts = []
    row = 0
    for source, rows in sources:
        parts.append(Part(source, (rows, *rest), (row, *(0 for _ in rest))))
        row += rows
    return WeightSpec(name=name, shape=(row, *rest), layouts=(tuple(parts),))


def _attention_weights(layer: int, spec: AttentionSpec, hidden_size: int) -> list[WeightSpec]:
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = [("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)]

    def named(kind: str) -> list[tuple[str, int]]:
        return [(f"{theirs}.self_attn.{name}.{kind}", rows) for name, rows in qkv]

    weights = [
        whole(f"{ours}.attention_norm", f"{theirs}.input_layernorm.weight", hidden_size),
        whole(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm.weight", hidden_size),
        stacked(f"{ours}.qkv", named("weight"), hidden_size),
        whole(f"{ours}.output", f"{theirs}.self_attn.o_proj.weight", hidden_size, width),
    ]
    if spec.has_qkv_bias:
        weights.append(stacked(f"{ours}.qkv_bias", named("bias")))
    if spec.has_output_bias:
        weights.append(whole(f"{ours}.output_bias", f"{theirs}.self_attn.o_proj.bias", hidden_size))
    if spec.qk_norm is not None:
        sizes = (spec.head_dim,) * 2 if spec.qk_norm == "head" else (width, kv_width)
        for letter, size in zip("qk", sizes, strict=True):
            weights.append(
                whole(f"{ours}.{letter}_norm", f"{theirs}.self_attn.{letter}_norm.weight", size)
            )
    return weights


def _mlp_weights(
    ours: str, theirs: str, size: int, hidden_size: int, *, has_bias: bool = False
) -> list[WeightSpec]:
    names = [(f"{theirs}.gate_proj", size), (f"{theirs}.up_proj", size)]
    weights = [
        stacked(f"{ours}.gate_up", [(f"{n}.weight", rows) for n, rows in names], hidden_size),
        whole(f"{ours}.down", f"{theirs}.down_proj.weight", hidden_size, size),
    ]
    if has_bias:
        weights.append(stacked(f"{ours}.gate_up_bias", [(f"{n}.bias", rows) for n, rows in names]))
        weights.append(whole(f"{ours}.down_bias", f"{theirs}.down_proj.bias", hidden_size))
    return weights


def _moe_weights(layer: int, moe: MoeSpec, names: MoeNames, hidden_size: int) -> list[WeightSpec]:
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    count, size = moe.router.num_experts, moe.intermediate_size
    experts, fused = f"{theirs}.{names.experts}", f"{theirs}.{names.fused}"
    gate_up = [
        Part(f"{experts}.{expert}.{name}.weight", (size, hidden_size), (expert, row, 0))
        for expert in range(count)
        for name, row in ((names.gate, 0), (names.up, size))
    ]
    down = [
        Part(f"{experts}.{expert}.{names.down}.weight", (hidden_size, size), (expert, 0, 0))
        for expert in range(count)
    ]
    both_shape, down_shape = (count, 2 * size, hidden_size), (count, hidden_size, size)
    weights = [
        whole(f"{ours}.router", f"{theirs}.{names.router}", count, hidden_size, is_fp32=True),
        WeightSpec(
            name=f"{ours}.experts.gate_up",
            shape=both_shape,
            layouts=(tuple(gate_up), (Part(f"{fused}.gate_up_proj", both_shape, (0, 0, 0)),)),
        ),
        WeightSpec(
            name=f"{ours}.experts.down",
            shape=down_shape,
            layouts=(tuple(down), (Part(f"{fused}.down_proj", down_shape, (0, 0, 0)),)),
        ),
    ]
    if moe.shared_intermediate_size:
        weights += _mlp_weights(
            f"{ours}.shared",
            f"{theirs}.mlp.shared_expert",
            moe.shared_intermediate_size,
            hidden_size,
        )
    if moe.has_shared_gate:
        weights.append(
            whole(
                f"{ours}.shared_gate", f"{theirs}.mlp.shared_expert_gate.weight", 1, hidden_size,
                is_fp32=True,
            )
        )  # fmt: skip
    return weights
