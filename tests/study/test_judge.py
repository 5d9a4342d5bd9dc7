"""Judging placements: figures counted by hand, replicas chosen alike, bounds that hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Mesh, Placement
from moe_serve.experts.trace import Trace
from moe_serve.study.judge import (
    Topology,
    choose_replicas,
    deal_homes,
    judge_placement,
    least_ranks,
    read_topology,
)
from moe_serve.study.place import PlaceOptions, place, split

MESH = Mesh(num_ranks=4, ranks_per_node=2)


def trace_of(ids: list[list[list[int]]], lengths: list[int], num_experts: int = 4) -> Trace:
    array = np.array(ids, np.uint8)
    return Trace(
        name="small",
        ids=array,
        weights=np.ones(array.shape, np.float16),
        seq_offsets=np.cumsum([0, *lengths]),
        layer_ids=np.arange(array.shape[1]),
        num_experts=num_experts,
        top_k=array.shape[2],
    )


def one_each(num_layers: int) -> Placement:
    """Expert e on rank e, in every layer."""
    return Placement(MESH, 4, tuple(((0,), (1,), (2,), (3,)) for _ in range(num_layers)))


def test_figures_are_what_counting_gives() -> None:
    # homes: sequence 0 (2 tokens) on rank 0, sequence 1 (1 token) on rank 1
    trace = trace_of([[[0, 1], [2, 3]], [[0, 2], [0, 1]], [[1, 3], [3, 1]]], [2, 1])
    assert deal_homes(trace, MESH).tolist() == [0, 0, 1]
    judged = judge_placement(one_each(2), trace, hidden_size=100, bytes_per_value=2)
    assert judged.ranks_per_token == 2.0
    # local pairs, of 12: 1, 0, 1, 1, 1, 1
    assert judged.local_share == pytest.approx(5 / 12)
    # other ranks: {1}, {2,3}, {2}, {1}, {3}, {3}
    assert judged.remote_ranks == pytest.approx(7 / 6)
    # other nodes: none, node 1, node 1, none, node 1, node 1
    assert judged.remote_nodes == pytest.approx(4 / 6)
    # heaviest: 0 -> 2, 0 -> 0, 1 -> 3
    assert judged.hop_cross == pytest.approx(2 / 3)
    assert judged.hop_cross_node == pytest.approx(2 / 3)
    # loads: layer 0: 2, 2, 1, 1; layer 1: 1, 2, 1, 2 of a mean of 1.5
    assert judged.imbalance == pytest.approx(1 / 3)
    assert judged.imbalance_of_batches == pytest.approx(1 / 3)
    assert judged.balancedness == pytest.approx(3 / 4)
    assert judged.utilisation == pytest.approx(0.75, abs=1e-4)
    assert judged.bytes_two_exchange["per_expert"] == pytest.approx(2 * 7 / 6 * 200)
    assert judged.bytes_two_exchange["dedup"] == pytest.approx((7 / 6 + 7 / 6) * 200)
    assert judged.traffic.sum() == pytest.approx(2.0)
    assert judged.traffic[0].tolist() == pytest.approx([3 / 6, 2 / 6, 2 / 6, 1 / 6])


def test_replicas_are_taken_at_home_then_in_the_node_then_by_turns() -> None:
    holds = np.zeros((2, 4), bool)
    holds[0, [0, 3]] = True
    holds[1, [2, 3]] = True
    homes = np.array([0, 1, 2, 3, 0, 1])
    chosen = choose_replicas(holds, np.array([[0, 1]] * 6), homes, MESH)
    assert chosen[:, 0].tolist() == [0, 0, 3, 3, 0, 0]
    assert chosen[:, 1].tolist() == [2, 3, 2, 3, 2, 3]


def test_no_placement_is_below_the_bound() -> None:
    source = np.random.default_rng(0)
    ids = np.argsort(source.random((40, 2, 8)), axis=2)[:, :, :3]
    trace = trace_of(ids.tolist(), [40], num_experts=8)
    bound = least_ranks(trace, 2)
    assert 1.0 <= bound <= 3.0
    for _ in range(100):
        owners = source.permutation(8) // 2
        layer = tuple((int(rank),) for rank in owners)
        judged = judge_placement(Placement(MESH, 8, (layer, layer)), trace)
        assert judged.ranks_per_token >= bound - 1e-9


def test_strategies_learn_from_the_first_sequences_only() -> None:
    source = np.random.default_rng(1)
    ids = np.argsort(source.random((60, 2, 8)), axis=2)[:, :, :2]
    trace = trace_of(ids.tolist(), [6] * 10, num_experts=8)
    training, held_out = split(trace)
    assert (training.num_seqs, held_out.num_seqs) == (7, 3)
    options = PlaceOptions(mesh=MESH, strategies=("joint", "affinity"), other=trace)
    placed = place(trace, options)
    assert list(placed) == ["contiguous", "eplb", "joint", "affinity"]
    changed = trace_of(np.concatenate([ids[:42], ids[42:][::-1]]).tolist(), [6] * 10, 8)
    again = place(changed, options)
    for name, one in placed.items():
        assert again[name].placement.ranks == one.placement.ranks
        assert set(one.judged) == {"training", "held out", "another task"}
        assert one.placement.trained_on == {"trace": "small", "tokens": 42}


def test_what_cannot_be_split_or_compared_is_refused() -> None:
    trace = trace_of([[[0, 1]], [[1, 2]]], [2])
    with pytest.raises(ConfigError, match="has 1 sequence"):
        split(trace)
    two = trace_of([[[0, 1]], [[1, 2]]], [1, 1])
    other = trace_of([[[0, 1], [1, 2]]] * 2, [1, 1])
    with pytest.raises(ConfigError, match="of two models"):
        place(two, PlaceOptions(mesh=MESH, other=other))


def test_a_topology_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"latency_us": 5}))
    assert read_topology(path) == Topology(latency_us=5)
    assert read_topology(None) == Topology()
    for text, says in (
        ("{", "not a topology"),
        ("[]", "an object of"),
        ('{"speed": 1}', "an object of expert_us"),
        ('{"latency_us": 0}', "latency_us is 0; give a number above 0"),
        ('{"latency_us": "x"}', "latency_us is 'x'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_topology(path)


def test_one_layer_and_parts_without_tokens(tmp_path: Path) -> None:
    trace = trace_of([[[0, 1]], [[1, 2]], [[3, 0]]], [1, 1, 1])
    judged = judge_placement(one_each(1), trace)
    assert judged.hop_cross == judged.bytes_coherent == 0
    assert judged.us_coherent > 0
    json.loads(json.dumps(judged.as_json(), allow_nan=False))
    empty = trace_of([[[0, 1]], [[1, 2]]], [1, 1, 0])
    with pytest.raises(ConfigError, match="has 0 tokens"):
        split(empty)
