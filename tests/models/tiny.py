"""Tiny random checkpoints of every family, made by transformers, and a loop over our decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe_serve.kernels import suite
from moe_serve.models.checkpoint import load_weights
from moe_serve.models.decoder import Decoder
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.types import ForwardBatch

VOCAB_SIZE = 199
CONTEXT = 256
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": None,
}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# one for every file in moe_serve/models; what can vary within a type varies here
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_COMMON, "head_dim": 16, "sliding_window": 20},
    "qwen2": {
        **_COMMON, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {**_COMMON, "head_dim": 16, "rope_theta": 5e4},
    "qwen3_moe": {
        **_COMMON, **_MOE, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        **_COMMON, **_MOE, "shared_expert_intermediate_size": 40, "use_sliding_window": True,
        "sliding_window": 20,
    },
    "olmoe": {**_COMMON, "num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 0.5},
    "mixtral": {
        **_COMMON, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 24,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def save_checkpoint(
    folder: Path, model_type: str, changes: dict[str, Any] | None = None, **save_options: Any
) -> Any:
    """Write a random float32 checkpoint to `folder`; return transformers' model of it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **(changes or {})})
    config.dtype = "float32"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # wide enough that experts, windows and positions all matter
            parameter.normal_(std=0.15 if parameter.dim() > 1 else 0.2)
            if parameter.dim() == 1:
                parameter += 1.0
    model.save_pretrained(folder, **save_options)
    return model


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """Load a checkpoint as the engine does."""
    spec = read_spec(HFConfig.read(folder))
    return Decoder(spec, load_weights(folder, spec, dtype), suite.load("auto"), CONTEXT)


def logits_in_chunks(decoder: Decoder, token_ids: list[int], chunks: list[int]) -> Tensor:
    """Run one sequence in chunks of the given lengths through a paged cache; return all logits."""
    block_size = 16
    num_blocks = -(-len(token_ids) // block_size)
    num_groups = len(decoder.groups)
    caches = decoder.allocate_caches((num_blocks,) * num_groups, block_size)
    table = torch.arange(1, num_blocks + 1, dtype=torch.int32)[None]
    parts = []
    start = 0
    with torch.inference_mode():
        for length in chunks:
            positions = torch.arange(start, start + length)
            batch = ForwardBatch(
                token_ids=torch.tensor(token_ids[start : start + length]),
                positions=positions,
                sequence_ids=torch.zeros(length, dtype=torch.int64),
                query_lens=(length,),
                context_lens=(start + length,),
                slot_mapping=(positions + block_size,) * num_groups,
                block_tables=(table,) * num_groups,
                block_size=block_size,
                sample_rows=torch.arange(length),
            )
            parts.append(decoder.logits(decoder.forward(batch, caches)))
            start += length
    return torch.cat(parts)
