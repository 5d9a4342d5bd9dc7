"""The routers asked early: at distance 0 they must choose as the model does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_serve.errors import TraceError
from moe_serve.predictors.base import Gates
from moe_serve.predictors.gate_lookahead import GateLookahead
from tests.predictors.streams import SHAPE, Routing, make, run


def test_distance_zero_is_the_routing() -> None:
    routing = Routing(seed=0, num_tokens=50)
    predictor = GateLookahead(SHAPE, None, routing.gates)
    for layer in range(SHAPE.num_layers):
        scores = predictor.scores(layer, routing.hidden[:, layer])
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : SHAPE.top_k]
        assert (np.sort(chosen, axis=1) == np.sort(routing.ids[:, layer], axis=1)).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_biases_are_those_of_the_choice(score: str) -> None:
    routing = Routing(seed=1, num_tokens=5)
    source = np.random.default_rng(0)
    biases = [source.normal(size=SHAPE.num_experts).astype(np.float32)] * SHAPE.num_layers
    gates = replace(
        routing.gates, score="sigmoid" if score == "sigmoid" else "softmax", router_biases=biases
    )
    logits = GateLookahead(SHAPE, None, gates).scores(2, routing.hidden[:, 2])
    plain = GateLookahead(SHAPE, None, routing.gates).scores(2, routing.hidden[:, 2])
    np.testing.assert_allclose(logits, plain + biases[2], rtol=1e-5, atol=1e-5)
    chosen = GateLookahead(SHAPE, None, replace(gates, selection_biases=biases))
    if score == "sigmoid":
        expected = 1 / (1 + np.exp(-logits))
    else:
        expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    got = chosen.scores(2, routing.hidden[:, 2])
    np.testing.assert_allclose(got, expected + biases[2], rtol=1e-4, atol=1e-5)


def test_near_layers_are_guessed_best_and_the_correction_helps() -> None:
    routing = Routing(seed=2, num_tokens=400)
    corrected = run(make("gate_lookahead", routing), routing)
    layer = 7

    def recall(guesses: list[np.ndarray], after: int) -> float:
        found = []
        for token in range(200, 400):
            best = np.argsort(-guesses[token][after + 1, layer])[: SHAPE.top_k]
            found.append(len(set(best) & set(routing.ids[token, layer])) / SHAPE.top_k)
        return float(np.mean(found))

    assert recall(corrected, layer - 1) > recall(corrected, layer - 5)
    assert recall(corrected, layer - 1) > 0.6
    predictor = GateLookahead(SHAPE, None, routing.gates)
    raw = []
    for token in range(200, 400):
        scores = predictor.scores(layer, routing.hidden[token : token + 1, layer - 4])
        best = np.argsort(-scores[0])[: SHAPE.top_k]
        raw.append(len(set(best) & set(routing.ids[token, layer])) / SHAPE.top_k)
    assert recall(corrected, layer - 4) > np.mean(raw)


def test_hidden_states_that_are_no_numbers_give_probabilities() -> None:
    routing = Routing(seed=3, num_tokens=3)
    routing.hidden[1, 2:5] = np.nan
    for guess in run(make("gate_lookahead", routing), routing):
        assert np.isfinite(guess).all()


def test_gates_of_another_model_are_refused() -> None:
    gates = Gates(router_weights=[], norm_weights=[], norm_eps=1e-6)
    with pytest.raises(TraceError, match="gates of 0 layers for 9"):
        GateLookahead(SHAPE, None, gates)
