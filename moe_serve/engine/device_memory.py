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
from moe_serve.models.spec import ModelSpec

logger = logging.getLogger(__name__)

_MIB = 2**20
# the parts of prompt chunks' attention; see kernels/gpu/attention_plan.py
_ATTENTION_BYTES = 128 * _MIB
# of each of a step's tokens: the residual, its sum, what is normed, and what a layer gives
_HIDDEN_ROWS = 4
# of each sampled row: logits in the model's dtype, in float32, and as they are edited and sorted
_LOGITS_FLOAT32 = 4
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
    """Return a bound of what the largest step holds at once besides weights and caches."""
    num_tokens = config.scheduler.max_num_batched_tokens
    num_samples = min(config.scheduler.max_num_seqs, num_tokens)
    attention = spec.attention
    size = dtype.itemsize
    heads = attention.num_heads + 2 * attention.num_kv_heads
    rows = _HIDDEN_ROWS * spec.hidden_size
    projected = (heads + attention.num_heads) * attention.head_dim
    widest = 0
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
    tokens = num_tokens * (rows + max(projected, widest)) * size
    logits = num_samples * spec.vocab_size * (size + _LOGITS_FLOAT32 * torch.float32.itemsize)
    return int((max(tokens, num_tokens * rows * size + logits) + _ATTENTION_BYTES) * _FRAGMENTS)
