"""Recorded routing, as it is and as a model of another shape would have it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moe_serve.experts.trace import Trace


def first_layers(trace: Trace, count: int) -> Trace:
    """Return the routing of the first `count` layers alone."""
    return replace(
        trace,
        ids=trace.ids[:, :count],
        weights=trace.weights[:, :count],
        layer_ids=trace.layer_ids[:count],
    )


def widened(trace: Trace, num_experts: int, top_k: int) -> Trace:
    """Return a trace of twice the experts, of the routing of two tokens at once.

    The first half of the experts is what a token used, the second what the token as far into
    the next sequence did; of each the heaviest half of top_k. So each half keeps the habits that
    were recorded. A sequence ends with the shorter of the two. num_experts: twice the trace's;
    top_k: even, at most twice the trace's.
    """
    assert num_experts == 2 * trace.num_experts, (num_experts, trace.num_experts)
    assert top_k % 2 == 0, top_k
    assert top_k <= 2 * trace.top_k, (top_k, trace.top_k)
    offsets = trace.seq_offsets.tolist()
    lengths = np.diff(trace.seq_offsets)
    parts: list[tuple[range, range]] = []
    ends = [0]
    for number in range(trace.num_seqs):
        other = (number + 1) % trace.num_seqs
        count = int(min(lengths[number], lengths[other]))
        starts = offsets[number], offsets[other]
        parts.append((range(starts[0], starts[0] + count), range(starts[1], starts[1] + count)))
        ends.append(ends[-1] + count)
    left, right = (np.concatenate(side) for side in zip(*parts, strict=True))
    half = top_k // 2
    ids = [trace.ids[left, :, :half], trace.ids[right, :, :half] + trace.num_experts]
    weights = np.concatenate([trace.weights[rows, :, :half] for rows in (left, right)], axis=2)
    order = np.argsort(-weights.astype(np.float32), axis=2, kind="stable")
    return Trace(
        name=f"{trace.name} widened",
        ids=np.take_along_axis(np.concatenate(ids, axis=2), order, 2).astype(np.uint8),
        weights=np.take_along_axis(weights, order, 2),
        seq_offsets=np.array(ends, dtype=np.int64),
        layer_ids=trace.layer_ids,
        num_experts=num_experts,
        top_k=top_k,
    )


def made_up(num_layers: int, num_experts: int, top_k: int) -> Trace:
    """Return random routing of two sequences, for a dry run."""
    chance = np.random.default_rng(0)
    tokens = 2 * 8
    shape = (tokens, num_layers, num_experts)
    ids = np.argsort(chance.random(shape), axis=2)[:, :, :top_k].astype(np.uint8)
    return Trace(
        name="made-up",
        ids=ids,
        weights=np.full(ids.shape, 1 / top_k, dtype=np.float16),
        seq_offsets=np.array([0, tokens // 2, tokens], dtype=np.int64),
        layer_ids=np.arange(num_layers),
        num_experts=num_experts,
        top_k=top_k,
    )
