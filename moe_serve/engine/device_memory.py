"""What a GPU's memory is for, planned before anything is there: weights, slots, KV, and the rest.

The rest is what a step needs while it runs, and the CUDA graphs. Both are bounds from the shapes:
what is measured against them is in `benchmarks.gpu`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from moe_serve.config import EngineConfig
from moe_serve.engine.memory import KV_SHARE, available_bytes, text_of
from moe_serve.engine.model_runner import LOGIT_ROWS
from moe_serve.engine.sampler import sampling_bytes
from moe_serve.kernels.forward.gpu import MOST_SEQS
from moe_serve.kernels.gpu.attention_plan import PART_BYTES, Shape
from moe_serve.kernels.gpu.buckets import most_part_bytes
from moe_serve.kernels.gpu.numerics import NUMERICS
from moe_serve.models.spec import ModelSpec

logger = logging.getLogger(__name__)

# of each of a step's tokens: the residual, its sum, what is normed, and what a layer gives
_HIDDEN_ROWS = 4
# an allocator's pieces that are free but too small
_FRAGMENTS = 1.15


@dataclass(frozen=True, slots=True)
class Room:
    """What there is for weights, expert slots, keys and values, in bytes, where the model is.

    kv_share: of what weights leave, the most that keys and values get unasked.
    """

    num_bytes: int
    kv_share: float


def room_on(
    device: torch.device, config: EngineConfig, spec: ModelSpec, dtype: torch.dtype
) -> Room:
    """Return the room on a device; on the host all that is available."""
    if device.type == "cpu":
        return Room(available_bytes(), KV_SHARE)
    usable = usable_bytes(device, config.runtime.gpu_memory_utilization)
    steps = workspace_bytes(config, spec, dtype)
    room = max(0, usable - steps)
    logger.info(
        "memory of %s: %s may be used; steps %s; for weights, experts and KV %s",
        device, text_of(usable), text_of(steps), text_of(room),
    )  # fmt: skip
    return Room(room, 1.0)


def usable_bytes(device: torch.device, utilization: float) -> int:
    """Return what may still be taken of a device so that no more than a share of it is used.

    What other processes hold counts as used. On the host: what is available.
    """
    if device.type == "cpu":
        return available_bytes()
    free, total = torch.cuda.mem_get_info(device)
    # what torch keeps for itself is free for us
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min(free + kept, int(total * utilization) - (total - free) + kept))


def workspace_bytes(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return a bound of what the largest step holds at once besides weights and caches.

    And of what graphs keep to themselves. Nobody can plan for what other ranks send; nor is in it
    what CUDA needs for the nodes of graphs.
    """
    num_tokens = config.scheduler.max_num_batched_tokens
    num_samples = min(config.scheduler.max_num_seqs, num_tokens)
    hidden = num_tokens * _HIDDEN_ROWS * spec.hidden_size * dtype.itemsize
    # of prompts whose logprobs are asked for, as many rows as of samples, or more
    rows = max(num_samples, min(LOGIT_ROWS, num_tokens))
    layers = _layer_bytes(num_tokens, spec, dtype) + PART_BYTES
    held = max(layers, hidden + _logit_bytes(rows, spec.vocab_size, dtype))
    if config.runtime.fused:
        num_seqs = min(MOST_SEQS, config.scheduler.max_num_seqs + 7)  # as buckets are rounded up
        # what graphs allocate is theirs; what is between them is in place
        held += 2 * _layer_bytes(num_seqs, spec, dtype)
        held += _bucket_part_bytes(num_seqs, config, spec, dtype)
    return int(held * _FRAGMENTS)


def _layer_bytes(num_tokens: int, spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return a bound of what a layer holds of so many tokens, without the parts of attention."""
    attention = spec.attention
    heads = attention.num_heads + 2 * attention.num_kv_heads
    projected = (heads + attention.num_heads) * attention.head_dim
    widest = projected
    for layer in spec.layers:
        moe = layer.moe
        if moe is None:
            width = 3 * layer.mlp_intermediate_size
        else:
            # of each pair what is between the two products, and the result; the shared expert's
            pair = moe.intermediate_size + spec.hidden_size
            width = moe.router.top_k * pair + 3 * moe.shared_intermediate_size
            width += 4 * moe.router.num_experts
        widest = max(widest, width)
    return num_tokens * (_HIDDEN_ROWS * spec.hidden_size + widest) * dtype.itemsize


def _logit_bytes(num_rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """Return a bound of what so many rows of logits take: as they are made, and as they are used.

    They are made in the model's dtype.
    """
    wide = num_rows * vocab_size * torch.float32.itemsize
    made = 0 if dtype == torch.float32 else num_rows * vocab_size * dtype.itemsize
    return wide + max(made, sampling_bytes(num_rows, vocab_size))


def _bucket_part_bytes(
    num_seqs: int, config: EngineConfig, spec: ModelSpec, dtype: torch.dtype
) -> int:
    attention, numerics = spec.attention, config.runtime.numerics
    assert numerics in NUMERICS, numerics
    shape = Shape(attention.num_heads, attention.num_kv_heads, attention.head_dim, dtype.itemsize)
    longest = config.weights.max_model_len or spec.max_position_embeddings
    return most_part_bytes(shape, num_seqs, longest, numerics)
