"""Measuring guesses: recall, the gate on misses, splits by sequence, and no cheating."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_serve.errors import TraceError
from moe_serve.experts.trace import Trace, read_trace
from moe_serve.study import prediction
from moe_serve.study.prediction import (
    in_domain,
    make_predictor,
    measure,
    prequential,
    trained_state,
    transfer,
)


@pytest.fixture(scope="module")
def demo(shared_data: Path) -> Trace:
    return read_trace(shared_data / "traces" / "demo_moe.npz")


@pytest.fixture(scope="module")
def intent(shared_data: Path) -> Trace:
    return read_trace(shared_data / "traces" / "intent.npz")


def test_the_oracle_finds_all_and_wastes_nothing(intent: Trace) -> None:
    part = intent.sequences(0, 3)
    found = measure(make_predictor("oracle", part), part, slots=12)
    for row in found.accuracy():
        assert row.recall == row.recall_twice == 1
        assert row.precision in (None, 1)
    late = found.accuracy(first_token=100)
    assert late[0].cover == 1, "all layers are known before the first"
    assert 0.7 < late[6].cover < 0.8, "20 of 26 layers are six behind another"


def test_a_useless_predictor_issues_nothing(intent: Trace) -> None:
    part = intent.sequences(0, 4)
    found = prequential("popularity", part, slots=26)
    assert all(row.issued == 0 for row in found.accuracy(0, 100))
    for row in found.accuracy():
        assert row.precision is None or row.precision > 0.6
        assert 0.2 < row.recall < 0.8


def test_batches_are_counted_by_their_union(intent: Trace) -> None:
    part = intent.sequences(0, 9)
    one, eight = prequential("popularity", part), prequential("popularity", part, batch=8)
    used = prediction.USED
    assert one.counts[:, 0, used].sum() == part.ids.size
    assert eight.counts[:, 0, used].sum() < part.ids.size
    assert len(eight.counts) < len(one.counts)
    assert eight.first_tokens[1] == 8
    oracle = measure(make_predictor("oracle", part), part, batch=8)
    assert all(row.recall == 1 for row in oracle.accuracy())


def test_misses_are_those_of_the_cache(intent: Trace) -> None:
    """Counted by hand: with all slots only an expert's first use misses."""
    part = intent.sequences(0, 2)
    found = prequential("popularity", part, slots=part.num_experts)
    first_uses = sum(len(np.unique(part.ids[:, layer])) for layer in range(part.num_layers))
    assert found.counts[:, 0, prediction.MISSES].sum() == first_uses


def test_guesses_on_a_prefix_do_not_depend_on_the_rest(intent: Trace) -> None:
    part = intent.sequences(0, 3)
    cut = int(part.seq_offsets[2])
    ids = part.ids.copy()
    ids[cut:] = ids[cut:][::-1]
    other = Trace(
        name="reversed",
        ids=ids,
        weights=part.weights,
        seq_offsets=part.seq_offsets,
        layer_ids=part.layer_ids,
        num_experts=part.num_experts,
        top_k=part.top_k,
    )
    first, second = prequential("learned_ids", part), prequential("learned_ids", other)
    assert (first.counts[:cut] == second.counts[:cut]).all()
    assert (first.counts[cut:] != second.counts[cut:]).any()


def test_token_ids_tell_the_experts_before_layer_0(demo: Trace) -> None:
    part = demo.sequences(0, 3)
    table = prequential("token_table", part).accuracy(first_token=250)
    popular = prequential("popularity", part).accuracy(first_token=250)
    assert table[0].recall > 0.5
    assert table[0].recall > popular[0].recall + 0.2


def test_a_trained_start_is_better_than_none(intent: Trace) -> None:
    part, rest = intent.sequences(0, 4), intent.sequences(4, 6)
    for name in ("transition", "learned_ids"):
        started = transfer(name, part, rest).accuracy()
        cold = prequential(name, rest).accuracy()
        assert started[1].recall > cold[1].recall + 0.02, name


def test_training_learned_hash_twice_gives_the_same(demo: Trace) -> None:
    part = demo.sequences(0, 1)
    state, again = trained_state("learned_hash", part), trained_state("learned_hash", part)
    assert all((state[name] == again[name]).all() for name in state)


def test_in_domain_measures_the_last_sequences(demo: Trace) -> None:
    part = demo.sequences(0, 4)
    found = in_domain("transition", part, share=0.5)
    assert found.first_tokens[-1] + 1 == part.num_tokens - part.seq_offsets[2]


def test_a_trace_without_token_ids_is_refused_by_name(intent: Trace) -> None:
    for name in ("token_table", "learned_hash"):
        with pytest.raises(TraceError, match=f"{name} needs token_ids, which trace intent"):
            make_predictor(name, intent)
        with pytest.raises(TraceError, match="token_ids"):
            trained_state(name, intent)
    with pytest.raises(TraceError, match="gate_lookahead needs gates, hidden"):
        make_predictor("gate_lookahead", intent)


def test_a_state_of_another_model_is_refused(demo: Trace, intent: Trace) -> None:
    with pytest.raises(TraceError, match=r"table in the predictor's file is \[.*needs \["):
        transfer("learned_ids", demo.sequences(0, 1), intent)
