"""The study of affinity: its controls keep what they say, and its bound is one."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np

from benchmarks.affinity import choices, hops_of, measure, most_stays, shuffled, stays
from moe_serve.experts.trace import Trace
from moe_serve.study.place import split
from tests.experts.routing import synthetic_trace


def followers(num_tokens: int = 2000) -> Trace:
    """Return a trace of 8 experts, alike in load, each followed by one other of them always."""
    rng = np.random.default_rng(0)
    ids = np.zeros((num_tokens, 4, 1), np.uint8)
    ids[:, 0, 0] = rng.integers(0, 8, num_tokens)
    for layer in range(1, 4):
        ids[:, layer, 0] = rng.permutation(8)[ids[:, layer - 1, 0]]
    return replace(
        synthetic_trace(),
        ids=ids,
        weights=np.ones(ids.shape, np.float32),
        seq_offsets=np.arange(0, num_tokens + 1, 100),
        layer_ids=np.arange(4),
        num_experts=8,
        top_k=1,
    )


def test_the_heaviest_is_by_weight_not_by_place() -> None:
    trace = synthetic_trace()
    weights = np.zeros(trace.ids.shape, np.float16)
    weights[:, :, 1] = 1.0
    trace = replace(trace, weights=weights)
    assert (choices(trace, "top-1")[:, :, 0] == trace.ids[:, :, 1]).all()
    assert choices(trace, "all pairs") is trace.ids


def test_shuffling_keeps_loads_and_sequences() -> None:
    trace = synthetic_trace()
    for within in (False, True):
        found = shuffled(trace, "all pairs", 0, within)
        assert (found != trace.ids).any()
        bounds = trace.seq_offsets.tolist() if within else [0, trace.num_tokens]
        for first, last in pairwise(bounds):
            for layer in range(trace.num_layers):
                rows = np.sort(found[first:last, layer].view("u1,u1"), axis=0)
                assert (rows == np.sort(trace.ids[first:last, layer].view("u1,u1"), axis=0)).all()


def test_no_placement_is_above_the_bound() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        hops = rng.random((1, 4, 4)) ** 3
        best = 0.0
        for first in combinations(range(4), 2):
            for second in combinations(range(4), 2):
                owners = np.zeros((2, 4), np.int64)
                owners[0, list(first)] = owners[1, list(second)] = 1
                best = max(best, stays(hops, owners))
        assert best <= most_stays(hops, 2) + 1e-12


def test_what_always_follows_stays_and_is_no_matter_of_load() -> None:
    training, held_out = split(followers())
    parts = {"training": training, "held out": held_out}
    found = {name: values for _, name, values in measure(parts, 4, "top-1")}
    assert found["affinity"] == [1.0]
    assert found["hindsight"] == [1.0]
    assert found["bound"] == [1.0]
    for name in ("by load", "shuffled", "in sequences"):
        assert max(found[name]) < 0.35  # chance is .25
    assert hops_of(choices(held_out, "top-1"), 8).sum(axis=(1, 2)).tolist() == [1.0] * 3
