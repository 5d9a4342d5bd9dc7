"""What holds for every predictor, whatever it guesses by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_serve.errors import TraceError
from moe_serve.plugin import load
from moe_serve.predictors.base import START, Predictor, PredictorShape, union
from tests.predictors.streams import NAMES, SHAPE, Routing, make, run

LEARNING = [name for name in NAMES if name != "oracle"]


@pytest.fixture(scope="module")
def routing() -> Routing:
    return Routing(seed=0, num_tokens=120)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_seqs", [1, 3])
def test_guesses_are_probabilities(name: str, num_seqs: int, routing: Routing) -> None:
    for guess in run(make(name, routing, num_seqs=num_seqs), routing, num_seqs):
        assert guess.dtype == np.float32
        assert 0 <= guess.min() <= guess.max() <= 1
    one = make(name, routing)
    one.observe(next(routing.step(np.array([0]), np.array([0]))))
    assert one.predict(0, [0]).shape == (SHAPE.num_experts,)
    assert one.predict(0, [0]).dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
def test_the_same_events_give_the_same_guesses(name: str, routing: Routing) -> None:
    first = run(make(name, routing, num_seqs=2), routing, 2)
    again = run(make(name, routing, num_seqs=2), routing, 2)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", LEARNING)
def test_no_guess_sees_the_future(name: str, routing: Routing) -> None:
    shuffled = Routing(seed=0, num_tokens=120)
    order = np.concatenate([np.arange(60), 60 + np.random.default_rng(1).permutation(60)])
    shuffled.ids = routing.ids[order]
    shuffled.token_ids, shuffled.hidden = routing.token_ids[order], routing.hidden[order]
    before = run(make(name, routing), routing)[:60]
    after = run(make(name, shuffled), shuffled)[:60]
    assert (shuffled.ids[60:] != routing.ids[60:]).any()
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", LEARNING)
def test_a_guess_sees_no_layer_before_it_was_observed(name: str, routing: Routing) -> None:
    other = Routing(seed=0, num_tokens=120)
    other.ids = routing.ids.copy()
    other.ids[100, 5] = (routing.ids[100, 5] + 7) % SHAPE.num_experts
    other.hidden = routing.hidden.copy()
    other.hidden[100, 5] = 1
    seen, changed = run(make(name, routing), routing), run(make(name, other), other)
    assert (seen[100][:6] == changed[100][:6]).all()  # from before layer 0 to after layer 4


@pytest.mark.parametrize("name", LEARNING)
def test_learns_from_what_it_sees(name: str) -> None:
    routing = Routing(seed=3, num_tokens=500)
    guesses = run(make(name, routing), routing, furthest=1)

    def recall(first: int, last: int) -> float:
        found = []
        for token in range(first, last):
            for layer in range(1, SHAPE.num_layers):
                best = np.argsort(-guesses[token][layer, layer])[: SHAPE.top_k]
                found.append(len(set(best) & set(routing.ids[token, layer])) / SHAPE.top_k)
        return float(np.mean(found))

    chance = SHAPE.top_k / SHAPE.num_experts
    assert recall(300, 500) > chance + 0.1
    assert recall(300, 500) > recall(0, 40) - 0.02


def test_the_oracle_is_right(routing: Routing) -> None:
    guesses = run(make("oracle", routing), routing)
    for token, guess in enumerate(guesses):
        for layer in range(SHAPE.num_layers):
            assert set(np.flatnonzero(guess[0, layer])) == set(routing.ids[token, layer])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_uses_the_union(name: str, routing: Routing) -> None:
    predictor = make(name, routing, num_seqs=4)
    run(predictor, routing, 4)
    for observation in routing.step(np.arange(4), np.arange(4)):
        predictor.observe(observation)
        for layer in range(observation.layer + 1, SHAPE.num_layers):
            alone = np.stack([predictor.predict(layer, [name]) for name in range(4)])
            together = predictor.predict(layer, [0, 1, 2, 3])
            np.testing.assert_allclose(together, 1 - np.prod(1 - alone, axis=0), atol=1e-5)


def test_union_of_one_is_itself() -> None:
    one = np.array([[0.25, 0.5]], np.float32)
    assert (union(one) == one[0]).all()
    np.testing.assert_allclose(union(np.repeat(one, 2, axis=0)), [0.4375, 0.75])


@pytest.mark.parametrize("name", LEARNING)
def test_a_state_comes_back(name: str, routing: Routing) -> None:
    trained = make(name, routing)
    run(trained, routing)
    state = trained.state()
    assert state, "every one of these learns"
    kept = {field: array.copy() for field, array in state.items()}
    first, second = make(name, routing, state), make(name, routing, kept)
    again = first.state()
    assert again.keys() == state.keys()
    assert all(again[field].shape == state[field].shape for field in state)
    a, b = run(first, routing), run(second, routing)
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert all((state[field] == kept[field]).all() for field in state), "the state was changed"
    cold = run(make(name, routing), routing)
    assert not (a[0] == cold[0]).all() or not (a[1] == cold[1]).all(), "the state has no effect"


@pytest.mark.parametrize("name", LEARNING)
def test_a_state_of_another_shape_is_refused(name: str, routing: Routing) -> None:
    trained = make(name, routing)
    run(trained, routing)
    state = trained.state()
    other = PredictorShape(num_layers=SHAPE.num_layers, num_experts=32, top_k=SHAPE.top_k)
    with pytest.raises(TraceError, match=r"\[.*16.*\].*\[.*32.*\]|\[.*\].*needs"):
        load("moe_serve.predictors", name).build(other, state, routing.gates)
    for field in state:
        missing = {key: array for key, array in state.items() if key != field}
        with pytest.raises(TraceError, match=field):
            make(name, routing, missing)
    broken = {
        field: np.full_like(array, np.nan) if array.dtype.kind == "f" else array
        for field, array in state.items()
    }
    with pytest.raises(TraceError, match="finite"):
        make(name, routing, broken)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_need_is_named(name: str, routing: Routing) -> None:
    predictor = make(name, routing)
    for need in predictor.needs:
        with pytest.raises(TraceError, match=f"{name} needs {need}"):
            _run_without(name, need, routing)
    if not predictor.needs:
        for observation in routing.step(np.array([0]), np.array([0])):
            predictor.observe(replace(observation, token_ids=None, hidden=None))
            if observation.layer + 1 < SHAPE.num_layers:
                predictor.predict(observation.layer + 1, [0])


def _run_without(name: str, need: str, routing: Routing) -> None:
    if need == "gates":
        load("moe_serve.predictors", name).build(SHAPE)
        return
    predictor = make(name, routing)
    for observation in routing.step(np.array([0]), np.array([0])):
        if need == "token_ids":
            predictor.observe(replace(observation, token_ids=None))
        else:
            predictor.observe(replace(observation, hidden=None))


@pytest.mark.parametrize("name", LEARNING)
def test_memory_is_bounded(name: str, routing: Routing) -> None:
    """Ten thousand sequences of one token each; what is held stays what it was."""
    from moe_serve.study.prediction import held_bytes

    predictor = make(name, routing)
    num_seqs = 10_000
    row = np.array([0])
    sizes = []
    for sequence in range(num_seqs):
        row[0] = sequence % len(routing.ids)
        for observation in routing.step(row, np.array([sequence])):
            if observation.layer in (START, 0, 1) and (sequence < 600 or observation.layer < 0):
                predictor.observe(observation)
        if sequence in (599, num_seqs - 1):
            sizes.append((held_bytes(predictor), _num_entries(predictor)))
    (first_bytes, first_entries), (last_bytes, last_entries) = sizes
    assert first_bytes == last_bytes
    assert abs(first_entries - last_entries) <= 2  # of a step: some are not learned from


def _num_entries(thing: object, depth: int = 3) -> int:
    """Count the entries of the lists and dicts that an object holds."""
    if isinstance(thing, dict | list | set):
        return len(thing)
    is_part = type(thing).__module__.startswith("moe_serve.predictors") and depth > 0
    if not is_part:
        return 0
    return sum(_num_entries(part, depth - 1) for part in getattr(thing, "__dict__", {}).values())


@pytest.mark.parametrize("name", LEARNING)
def test_bears_prompts_and_left_out_layers(name: str, routing: Routing) -> None:
    """Several tokens of one sequence in a step, sequences that come and go, a layer left out."""
    predictor = make(name, routing)
    steps = [
        (np.arange(7), np.array([1, 1, 1, 1, 2, 2, 2])),
        (np.array([8, 9]), np.array([2, 1])),
        (np.arange(40), np.arange(100, 140)),
        (np.array([10]), np.array([1])),
    ]
    for rows, sequence_ids in steps:
        names = list(dict.fromkeys(sequence_ids.tolist()))
        for observation in routing.step(rows, sequence_ids):
            if observation.layer != 4:
                predictor.observe(observation)
            for layer in range(observation.layer + 1, SHAPE.num_layers):
                if observation.layer == 4 and name == "gate_lookahead":
                    continue
                guess = predictor.predict(layer, names)
                assert np.isfinite(guess).all()
                assert 0 <= guess.min() <= guess.max() <= 1


@pytest.mark.parametrize(
    "shape",
    [
        PredictorShape(num_layers=1, num_experts=4, top_k=1),
        PredictorShape(num_layers=2, num_experts=4, top_k=4),
        PredictorShape(num_layers=20, num_experts=8, top_k=1),
    ],
    ids=["layers1-experts4-top1", "layers2-experts4-top4", "layers20-experts8-top1"],
)
@pytest.mark.parametrize("name", NAMES)
def test_odd_shapes(name: str, shape: PredictorShape) -> None:
    routing = Routing(seed=1, num_tokens=12, shape=shape)
    predictor: Predictor = make(name, routing, num_seqs=2)
    for guess in run(predictor, routing, 2):
        assert 0 <= guess.min() <= guess.max() <= 1
