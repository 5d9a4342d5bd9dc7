"""Made-up routing with something to learn in it, and predictors built for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_serve.plugin import load, names
from moe_serve.predictors.base import START, Gates, Observation, Predictor, PredictorShape

Array = np.ndarray[Any, Any]
SHAPE = PredictorShape(num_layers=9, num_experts=16, top_k=3)
HIDDEN = 12
VOCABULARY = 20
NAMES = names("moe_serve.predictors")


class Routing:
    """Tokens of a few sequences whose experts follow from the token and the layer before.

    ids: int64 [num_tokens, num_layers, top_k]; token_ids; hidden: [num_tokens, num_layers, H].
    """

    def __init__(self, seed: int, num_tokens: int, shape: PredictorShape = SHAPE) -> None:
        source = np.random.default_rng(seed)
        world = np.random.default_rng(99)
        layers, experts, top_k = shape.num_layers, shape.num_experts, shape.top_k
        self.shape = shape
        self.gates = Gates(
            router_weights=[
                world.normal(size=(experts, HIDDEN)).astype(np.float32) for _ in range(layers)
            ],
            norm_weights=[1 + 0.1 * world.normal(size=HIDDEN).astype(np.float32)] * layers,
            norm_eps=1e-6,
        )
        embedding = world.normal(size=(VOCABULARY, HIDDEN))
        drift = 0.3 * world.normal(size=(layers, HIDDEN))
        self.token_ids = source.integers(0, VOCABULARY, num_tokens)
        noise = 0.2 * source.normal(size=(num_tokens, layers, HIDDEN)).cumsum(1)
        hidden = embedding[self.token_ids][:, None] + drift.cumsum(0) + noise
        self.hidden = hidden.astype(np.float32)
        self.ids = np.empty((num_tokens, layers, top_k), np.int64)
        for layer in range(layers):
            h = self.hidden[:, layer]
            normed = h / np.sqrt((h**2).mean(1) + 1e-6)[:, None] * self.gates.norm_weights[layer]
            scores = normed @ self.gates.router_weights[layer].T
            self.ids[:, layer] = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]

    def step(self, rows: Array, sequence_ids: Array) -> Iterator[Observation]:
        """Yield what a step on these tokens shows."""
        nothing = np.zeros((len(rows), 0))
        for layer in range(START, self.shape.num_layers):
            is_start = layer == START
            yield Observation(
                layer=layer,
                expert_ids=nothing.astype(np.int64) if is_start else self.ids[rows, layer],
                weights=np.ones((len(rows), 0 if is_start else self.shape.top_k), np.float32),
                sequence_ids=sequence_ids,
                token_ids=self.token_ids[rows],
                hidden=None if is_start else self.hidden[rows, layer],
            )

    def future(self, sequence_ids: Array) -> dict[str, Array]:
        """Return the state that the oracle wants."""
        return {"ids": self.ids, "sequence_ids": sequence_ids}


def make(
    name: str, routing: Routing, state: Mapping[str, Array] | None = None, num_seqs: int = 1
) -> Predictor:
    """Build a predictor by its name; the oracle gets the tokens in turn for `num_seqs` names."""
    if name == "oracle":
        state = routing.future(np.arange(len(routing.ids)) % num_seqs)
    module = load("moe_serve.predictors", name)
    predictor: Predictor = module.build(routing.shape, state, routing.gates)
    return predictor


def run(
    predictor: Predictor, routing: Routing, num_seqs: int = 1, furthest: int = 99
) -> list[Array]:
    """Show all tokens, `num_seqs` at a time; return the guesses of every step.

    Each is float32 [1 + num_layers, num_layers, num_experts]: from before layer 0, and then from
    after each layer, for the next `furthest` layers (zeros elsewhere).
    """
    guesses = []
    layers, experts = routing.shape.num_layers, routing.shape.num_experts
    sequence_ids = np.arange(num_seqs)
    for begin in range(0, len(routing.ids) - num_seqs + 1, num_seqs):
        rows = np.arange(begin, begin + num_seqs)
        of_step = np.zeros((1 + layers, layers, experts), np.float32)
        for observation in routing.step(rows, sequence_ids):
            predictor.observe(observation)
            first = observation.layer + 1
            for layer in range(first, min(first + furthest, layers)):
                guess = predictor.predict(layer, sequence_ids.tolist())
                of_step[observation.layer + 1, layer] = guess
        guesses.append(of_step)
    return guesses
