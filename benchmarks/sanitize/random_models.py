"""Small random models, run in one native call and in many."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sanitize.random_shapes import dtype_of, size_of
from moe_serve.kernels.suite import Kernels
from moe_serve.models.decoder import build_decoder
from moe_serve.models.dummy import dummy_weights
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.types import ForwardBatch

MAX_CONTEXT = 150


def _model_config(chance: random.Random) -> dict[str, Any]:
    """Return a small config.json of one of the families that differ in what a forward pass does."""
    kv_heads, layers = chance.randint(1, 3), chance.randint(1, 3)
    common = {
        "vocab_size": size_of(chance, 200),
        "hidden_size": size_of(chance, 130),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * chance.randint(1, 4),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * chance.randint(1, 40),
        "intermediate_size": size_of(chance, 90),
        "moe_intermediate_size": size_of(chance, 90),
        "shared_expert_intermediate_size": size_of(chance, 90),
        "max_position_embeddings": MAX_CONTEXT,
        "num_experts": chance.randint(4, 20),
        "num_experts_per_tok": chance.randint(1, 4),
        "norm_topk_prob": chance.random() < 0.5,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": chance.random() < 0.5,
    }
    own: dict[str, Any] = {
        "qwen3_moe": {"mlp_only_layers": [0] if chance.random() < 0.3 else []},
        "qwen2_moe": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        "olmoe": {"clip_qkv": 0.5},
        "llama": {"attention_bias": True, "mlp_bias": True},
        "mistral": {"sliding_window": 24},
    }
    model_type = chance.choice(list(own))
    return {"model_type": model_type, **common, **own[model_type]}


def forward(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
    """A small model, twice: in one native call and in many. They must agree in every bit."""
    spec = read_spec(HFConfig(_model_config(chance), Path("config.json")))
    dtype = dtype_of(chance)
    model = build_decoder(
        spec, dtype, kernels, MAX_CONTEXT, lambda into: dummy_weights(spec, dtype, into=into)
    )
    lens = [size_of(chance, MAX_CONTEXT - 1) for _ in range(chance.randint(1, 3))]
    block_size = chance.randint(1, 64)
    blocks = -(-MAX_CONTEXT // block_size)
    tables = torch.arange(1, len(lens) * blocks + 1, dtype=torch.int32).view(len(lens), blocks)
    num_groups = len(model.groups)
    caches = [
        model.allocate_caches((len(lens) * blocks,) * num_groups, block_size) for _ in range(2)
    ]
    fused = model.fused(caches[0])
    assert fused is not None
    for queries, contexts in ((lens, lens), ([1] * len(lens), [length + 1 for length in lens])):
        batch = _batch(queries, contexts, tables, block_size, num_groups, spec.vocab_size)
        with torch.inference_mode():
            hidden, again = fused(batch), model.forward(batch, caches[1])
            yield model.logits(hidden)
        assert torch.equal(hidden, again), "the fused forward pass has other bits"


def _batch(
    queries: list[int],
    contexts: list[int],
    tables: Tensor,
    block_size: int,
    num_groups: int,
    vocab_size: int,
) -> ForwardBatch:
    """Return a step of random tokens; tables: int32 [num_seqs, max_blocks], of every group."""
    pairs = list(zip(queries, contexts, strict=True))
    positions = torch.cat([torch.arange(context - query, context) for query, context in pairs])
    sequences = torch.repeat_interleave(torch.tensor(queries))  # [num_tokens]
    slots = tables[sequences, positions // block_size] * block_size + positions % block_size
    return ForwardBatch(
        token_ids=torch.randint(vocab_size, positions.shape),
        positions=positions,
        sequence_ids=sequences,
        query_lens=tuple(queries),
        context_lens=tuple(contexts),
        prompt_lens=tuple(contexts),
        slot_mapping=(slots,) * num_groups,
        block_tables=(tables,) * num_groups,
        block_size=block_size,
        sample_rows=torch.arange(len(positions)),
    )
