"""Tiny random checkpoints of every family, made by transformers, and a loop over our decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moe_serve.kernels import suite
from moe_serve.kernels.suite import Kernels
from moe_serve.models.checkpoint import load_weights
from moe_serve.models.decoder import Decoder, build_decoder
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


def load_decoder(
    folder: Path, dtype: torch.dtype = torch.float32, kernels: Kernels | None = None
) -> Decoder:
    """Load a checkpoint as the engine does; kernels: None for the best there are."""
    spec = read_spec(HFConfig.read(folder))
    return build_decoder(
        spec,
        dtype,
        kernels or suite.load(),
        CONTEXT,
        lambda into: load_weights(folder, spec, dtype, into=into),
    )


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens `start` .. + `length` of a sequence, whose blocks are given for each cache group."""

    token_ids: list[int]
    start: int
    length: int
    blocks: tuple[list[int], ...]


def batch_of(runs: list[Run], block_size: int) -> ForwardBatch:
    """Lay out a step; every token is sampled."""
    positions = [torch.arange(run.start, run.start + run.length) for run in runs]
    lengths = torch.tensor([run.length for run in runs])
    slots, tables = [], []
    for group in range(len(runs[0].blocks)):
        rows = [torch.tensor(run.blocks[group]) for run in runs]
        slots += [
            torch.cat(
                [
                    row[at // block_size] * block_size + at % block_size
                    for row, at in zip(rows, positions, strict=True)
                ]
            )
        ]
        table = torch.zeros(len(runs), max(map(len, rows)), dtype=torch.int32)
        for index, row in enumerate(rows):
            table[index, : len(row)] = row
        tables.append(table)
    tokens = [token for run in runs for token in run.token_ids[run.start : run.start + run.length]]
    return ForwardBatch(
        token_ids=torch.tensor(tokens),
        positions=torch.cat(positions),
        sequence_ids=torch.repeat_interleave(torch.arange(len(runs)), lengths),
        prompt_lens=tuple(len(run.token_ids) for run in runs),
        query_lens=tuple(run.length for run in runs),
        context_lens=tuple(run.start + run.length for run in runs),
        slot_mapping=tuple(slots),
        block_tables=tuple(tables),
        block_size=block_size,
        sample_rows=torch.arange(len(tokens)),
    )


def logits_in_chunks(decoder: Decoder, token_ids: list[int], chunks: list[int]) -> Tensor:
    """Run one sequence in chunks of the given lengths through a paged cache; return all logits."""
    block_size = 16
    num_blocks = -(-len(token_ids) // block_size)
    num_groups = len(decoder.groups)
    caches = decoder.allocate_caches((num_blocks,) * num_groups, block_size)
    blocks = (list(range(1, num_blocks + 1)),) * num_groups
    parts = []
    start = 0
    with torch.inference_mode():
        for length in chunks:
            batch = batch_of([Run(token_ids, start, length, blocks)], block_size)
            parts.append(decoder.logits(decoder.forward(batch, caches)))
            start += length
    return torch.cat(parts)
