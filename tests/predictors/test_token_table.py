"""What a token used before, known before layer 0; the ids seen longest ago are dropped."""

from __future__ import annotations

import numpy as np

from moe_serve.predictors import token_table
from moe_serve.predictors.base import START, Observation
from tests.predictors.streams import SHAPE, Routing, make, run


def test_a_trained_start_knows_a_token_at_once() -> None:
    past, now = Routing(seed=1, num_tokens=400), Routing(seed=2, num_tokens=1)
    table = make("token_table", past)
    run(table, past, furthest=0)
    recalls = []
    for predictor in (make("token_table", now, table.state()), make("token_table", now)):
        (guess,) = run(predictor, now)
        best = np.argsort(-guess[0], axis=1)[:, : SHAPE.top_k]
        hits = [len(set(a) & set(b)) for a, b in zip(best, now.ids[0], strict=True)]
        recalls.append(sum(hits) / now.ids.size)
    assert recalls[0] > 0.6
    assert recalls[0] > recalls[1] + 0.2


def test_the_token_seen_longest_ago_is_forgotten() -> None:
    table = token_table.TokenTable(SHAPE, None)
    many = token_table._KEPT_TOKENS + 10
    for token in range(many):
        table.observe(
            Observation(
                layer=START,
                expert_ids=np.zeros((1, 0), np.int64),
                weights=np.zeros((1, 0), np.float32),
                sequence_ids=np.array([0]),
                token_ids=np.array([token]),
            )
        )
    kept = set(table.state()["token_ids"].tolist())
    assert kept == set(range(10, many))
