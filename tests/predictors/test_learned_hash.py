"""The student of token ids: trained from routing, it knows all layers before the first."""

from __future__ import annotations

import numpy as np

from moe_serve.predictors import learned_hash
from moe_serve.predictors.base import Observation
from tests.predictors.streams import SHAPE, Routing, make, run


def recall_before_the_first_layer(guesses: list[np.ndarray], routing: Routing) -> float:
    found = []
    for token, guess in enumerate(guesses):
        best = np.argsort(-guess[0], axis=1)[:, : SHAPE.top_k]
        for layer in range(SHAPE.num_layers):
            found.append(len(set(best[layer]) & set(routing.ids[token, layer])) / SHAPE.top_k)
    return float(np.mean(found))


def test_trained_it_knows_what_tokens_use() -> None:
    past, now = Routing(seed=1, num_tokens=1500), Routing(seed=2, num_tokens=60)
    offsets = np.array([0, 700, 1500])
    state = learned_hash.train(SHAPE, past.ids, past.token_ids, offsets, epochs=12)
    trained = recall_before_the_first_layer(
        run(make("learned_hash", now, state), now, furthest=99), now
    )
    cold = recall_before_the_first_layer(run(make("learned_hash", now), now), now)
    table = make("token_table", past)
    run(table, past, furthest=0)
    known = recall_before_the_first_layer(run(make("token_table", now, table.state()), now), now)
    assert trained > cold + 0.2
    assert trained > known - 0.1, "which is all there is to know here"


def test_a_prompt_advances_the_state_token_by_token() -> None:
    """Five tokens in one step leave the same state as five steps."""
    routing = Routing(seed=3, num_tokens=6)
    at_once, one_by_one = make("learned_hash", routing), make("learned_hash", routing)
    at_once.observe(next(routing.step(np.arange(5), np.zeros(5, np.int64))))
    for token in range(5):
        one_by_one.observe(next(routing.step(np.array([token]), np.array([0]))))
    start: Observation = next(routing.step(np.array([5]), np.array([0])))
    for predictor in (at_once, one_by_one):
        predictor.observe(start)
    for layer in range(SHAPE.num_layers):
        np.testing.assert_array_equal(at_once.predict(layer, [0]), one_by_one.predict(layer, [0]))
