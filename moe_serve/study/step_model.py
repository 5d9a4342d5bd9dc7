"""The time of a step by what it must move: bytes over bandwidth, operations over their rate.

A step takes the longer of reading memory and of computing, then what its missing experts take to
come in, then the exchange between ranks, then a constant; nothing of that is hidden behind another.
Left out is what is in no constant of the machine: more sampling for more sequences, small tensors,
the index work of dispatch, and copies that slow the cores they share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_serve.experts.placement.base import Array
from moe_serve.models.checkpoint import selected, weights_bytes
from moe_serve.models.expert_weights import moe_layers, names_without_experts
from moe_serve.models.spec import ModelSpec
from moe_serve.study.expert_demand import ExpertDemand
from moe_serve.study.machine import Machine
from moe_serve.study.wire import exchange

_STEP_HEADER = 1  # collectives of a step, whatever its layers do


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a model's steps read and compute.

    body: all weights that every token uses, of all layers; head: what a sampled token needs beside
    them; row_bytes: of one token's hidden state. flops_per_token: without attention over the
    context and without the head. windows: of each cache group, its bytes of one token, its window
    (None: all of the context) and the layers in it.
    """

    body_bytes: int
    head_bytes: int
    slot_bytes: int
    row_bytes: int
    flops_per_token: int
    head_flops: int
    attention_width: int
    windows: tuple[tuple[int, int | None, int], ...]
    num_moe_layers: int
    top_k: int

    def context_bytes(self, context: float) -> float:
        """Return the keys and values that one token reads."""
        return sum(size * min(context, window or context) for size, window, _ in self.windows)

    def context_flops(self, context: float) -> float:
        """Return the operations of one token's attention: queries by keys, weights by values."""
        return sum(
            4 * self.attention_width * min(context, window or context) * layers
            for _, window, layers in self.windows
        )


def work_of(spec: ModelSpec, dtype: torch.dtype, slot_bytes: int) -> Work:
    """Return what steps of a model take. slot_bytes: of one expert, as the engine holds it."""
    body = names_without_experts(spec) - {"embedding", "head"}
    head = "embedding" if spec.is_embedding_tied else "head"
    moes = [moe for layer in spec.layers if (moe := layer.moe) is not None]
    chosen = sum(moe.router.top_k * 3 * spec.hidden_size * moe.intermediate_size for moe in moes)
    (head_weight,) = selected(spec, {head})
    return Work(
        body_bytes=weights_bytes(spec, dtype, body),
        head_bytes=weights_bytes(spec, dtype, {head}),
        slot_bytes=slot_bytes,
        row_bytes=spec.hidden_size * dtype.itemsize,
        flops_per_token=2 * (sum(w.num_elements for w in selected(spec, body)) + chosen),
        head_flops=2 * head_weight.num_elements,
        attention_width=spec.attention.num_heads * spec.attention.head_dim,
        windows=tuple(
            (group.bytes_per_token, group.window, len(group.layers))
            for group in spec.cache_groups(dtype.itemsize)
        ),
        num_moe_layers=len(moe_layers(spec)),
        top_k=max((moe.router.top_k for moe in moes), default=0),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One of the processes of a layout, and what it shares with the others.

    num_here: processes on its machine, who share memory's and the disk's rate and the cores. holds:
    bool [num_layers, num_experts, num_ranks] of the world that it exchanges rows with. slots: of
    each layer; None: all its experts are held.
    """

    machine: Machine
    num_here: int
    holds: Array
    slots: int | None
    dispatcher: str | None

    @property
    def num_ranks(self) -> int:
        return int(self.holds.shape[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Of one process and one step: what is moved, and the terms of its time."""

    read_bytes: float
    missed_experts: float
    miss_bytes: float
    network_bytes: float
    num_collectives: int
    memory_s: float
    compute_s: float
    miss_s: float
    exchange_s: float
    other_s: float

    @property
    def seconds(self) -> float:
        longer_s = max(self.memory_s, self.compute_s)
        return longer_s + self.miss_s + self.exchange_s + self.other_s


def step_time(
    work: Work,
    demand: ExpertDemand,
    process: Process,
    *,
    num_tokens: int,
    num_in_world: int,
    num_sampled: int,
    num_seqs: int,
    context: float,
) -> StepTime:
    """Return the time of a step of the process with most tokens.

    num_in_world: tokens of all ranks together. num_seqs: whose keys and values are read, once each;
    context: tokens that each token attends to, mean. A step that samples as many as it has tokens
    is one of decoding.
    """
    machine, holds = process.machine, process.holds
    is_decoding = num_sampled == num_tokens
    distinct = demand.distinct(num_in_world, holds, is_decoding)
    missed = 0.0
    if process.slots is not None:
        missed = demand.missed(num_in_world, process.slots, holds, is_decoding)
    read_bytes = (
        work.body_bytes
        + (work.head_bytes if num_sampled else 0)
        + num_tokens * work.row_bytes
        + distinct * work.slot_bytes
        + num_seqs * work.context_bytes(context)
    )
    flops = (
        num_tokens * (work.flops_per_token + work.context_flops(context))
        + num_sampled * work.head_flops
    )
    num_collectives, network_bytes = 0, 0.0
    if process.dispatcher is not None and process.num_ranks > 1:
        num_held = holds[0].sum(axis=0).tolist()
        layer = exchange(process.dispatcher, num_held, work.top_k, num_tokens, work.row_bytes)
        num_collectives = _STEP_HEADER + work.num_moe_layers * layer.num_collectives
        network_bytes = work.num_moe_layers * layer.num_bytes
    miss_bytes = missed * work.slot_bytes
    share = process.num_here / 1e9
    return StepTime(
        read_bytes=read_bytes,
        missed_experts=missed,
        miss_bytes=miss_bytes,
        network_bytes=network_bytes,
        num_collectives=num_collectives,
        memory_s=read_bytes * share / machine.memory_gb_per_s,
        compute_s=flops * share / machine.gflop_per_s,
        miss_s=miss_bytes * share / machine.disk_gb_per_s,
        exchange_s=num_collectives * machine.latency_us / 1e6
        + network_bytes / 1e9 / machine.network_gb_per_s,
        other_s=machine.step_us / 1e6,
    )
