"""The model that is measured: a Qwen3-MoE of random weights, written once as a checkpoint.

Every system reads the same folder: config.json, one safetensors file per layer, an index. There is
no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3-MoE, bf16, head and embedding apart."""

    hidden_size: int = 1024
    num_layers: int = 16
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 64
    num_experts: int = 64
    top_k: int = 8
    moe_intermediate_size: int = 384
    vocab_size: int = 32_000
    max_position_embeddings: int = 4096

    @property
    def expert_elements(self) -> int:
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def dense_elements(self) -> int:
        """Elements that every token's step reads: attention, routers and the head."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        layer = self.hidden_size * (heads * self.head_dim + self.num_experts)
        return self.num_layers * layer + self.hidden_size * self.vocab_size

    def config(self) -> dict[str, object]:
        """Return the contents of config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.moe_intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "torch_dtype": "bfloat16",
        }


# What --shape names. `baseline` is 1.32 B parameters, 0.225 B of them active for a token.
SHAPES = {
    "baseline": Shape(),
    "tiny": Shape(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,  # the least that vLLM's attention takes
        num_experts=8,
        top_k=2,
        moe_intermediate_size=32,
        vocab_size=256,
    ),
}


def cache_folder() -> Path:
    """Return where checkpoints are kept between runs: never inside the tree."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe-serve" / "peers"


def checkpoint(shape: Shape, cache: Path) -> Path:
    """Return the folder of the shape's checkpoint in `cache`, writing it if it is not there.

    It appears under its name only when it is complete. Peak memory is one layer.
    """
    key = hashlib.sha256(json.dumps(asdict(shape)).encode()).hexdigest()[:12]
    path = cache / f"qwen3-moe-{key}"
    if path.is_dir():
        return path
    partial = cache / f".{path.name}.{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        _write(shape, partial)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _write(shape: Shape, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for index, tensors in enumerate(_shards(shape)):
        name = f"model-{index + 1:05}-of-{shape.num_layers + 1:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index_json = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1) + "\n")


def _shards(shape: Shape) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each layer, then those around the layers."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(STD).to(torch.bfloat16)

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    hidden, inner = shape.hidden_size, shape.moe_intermediate_size
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for layer in range(shape.num_layers):
        tensors = {
            "input_layernorm.weight": ones(hidden),
            "post_attention_layernorm.weight": ones(hidden),
            "self_attn.q_proj.weight": matrix(query, hidden),
            "self_attn.k_proj.weight": matrix(key, hidden),
            "self_attn.v_proj.weight": matrix(key, hidden),
            "self_attn.o_proj.weight": matrix(hidden, query),
            "self_attn.q_norm.weight": ones(shape.head_dim),
            "self_attn.k_norm.weight": ones(shape.head_dim),
            "mlp.gate.weight": matrix(shape.num_experts, hidden),
        }
        for expert in range(shape.num_experts):
            tensors[f"mlp.experts.{expert}.gate_proj.weight"] = matrix(inner, hidden)
            tensors[f"mlp.experts.{expert}.up_proj.weight"] = matrix(inner, hidden)
            tensors[f"mlp.experts.{expert}.down_proj.weight"] = matrix(hidden, inner)
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
    yield {
        "model.embed_tokens.weight": matrix(shape.vocab_size, hidden),
        "model.norm.weight": ones(hidden),
        "lm_head.weight": matrix(shape.vocab_size, hidden),
    }
