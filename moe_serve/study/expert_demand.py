"""How many experts a step needs, and how many of them it has to bring in.

Without a trace every token is taken to choose each expert of a layer with the same chance, on its
own: the worst case for a cache. How uneven a few of them are over ranks is drawn, from one seed.
With a trace, steps are its own with so many sequences at once, and misses are those of the
runtime's cache and policy (see `moe_serve.study.replay`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moe_serve import plugin
from moe_serve.engine.division import misses_per_token
from moe_serve.engine.residency import chances_of
from moe_serve.errors import ConfigError
from moe_serve.experts.placement.base import Array
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.trace import Trace
from moe_serve.models.expert_weights import moe_layers
from moe_serve.models.spec import ModelSpec
from moe_serve.study.replay import batched_steps, cache_shape, replay, replay_steps
from moe_serve.study.states import POLICIES

_DRAWS = 64
_MOST_DRAWN = 16  # choices for each expert; with more, all experts are used anyway


@dataclass(slots=True)
class ExpertDemand:
    """chances: float [num_layers, num_experts], that a token uses an expert; trace, eviction: what
    decoding is replayed from, and with which policy.
    """

    chances: Array
    trace: Trace | None = None
    eviction: str = "adaptive"
    _distinct: dict[tuple[int, bytes], float] = field(default_factory=dict)
    _missed: dict[tuple[int, CacheShape], float] = field(default_factory=dict)

    def distinct(self, num_tokens: int, holds: Array, is_decoding: bool) -> float:
        """Return how many experts the busiest rank computes with in a step, over all layers.

        num_tokens: of all ranks. holds: bool [num_layers, num_experts, num_ranks], one each.
        is_decoding: each token is of another sequence.
        """
        if not self.chances.size or not num_tokens:
            return 0.0
        if self.trace is not None and is_decoding:
            return self._distinct_of_trace(self.trace, num_tokens, holds)
        num_experts, top_k = self.chances.shape[1], self.chances[0].sum()
        is_few = num_tokens * top_k <= _MOST_DRAWN * num_experts
        if self.trace is None and holds.shape[2] > 1 and is_few:
            return self._distinct_drawn(num_tokens, round(top_k), holds)
        is_used = 1 - (1 - self.chances) ** num_tokens
        return float((is_used[:, :, None] * holds).sum(axis=1).max(axis=1).sum())

    def missed(self, num_tokens: int, slots: int, holds: Array, is_decoding: bool) -> float:
        """Return how many experts the busiest rank brings in, over all layers; see `distinct`.

        slots: of each layer, on each rank. With several ranks, or prompts, the experts used most
        are taken to be those held, as the engine does where it divides memory.
        """
        num_ranks = holds.shape[2]
        if not num_tokens:
            return 0.0
        if self.trace is not None and is_decoding and num_ranks == 1:
            return self._missed_of_trace(self.trace, num_tokens, slots)
        num_layers = len(self.chances)
        return max(
            misses_per_token(
                self.chances[holds[:, :, rank]].reshape(num_layers, -1), slots, num_tokens
            )
            * num_tokens
            for rank in range(num_ranks)
        )

    def _distinct_drawn(self, num_tokens: int, top_k: int, holds: Array) -> float:
        """As `distinct`: few tokens are uneven over ranks, however even the chances are."""
        key = num_tokens, holds.tobytes()
        if key not in self._distinct:
            num_layers, num_experts = self.chances.shape
            noise = np.random.default_rng(0).random((_DRAWS, num_tokens, num_experts))
            chosen = noise.argpartition(top_k - 1, axis=2)[:, :, :top_k].reshape(_DRAWS, -1)
            is_used = np.zeros((_DRAWS, num_experts), np.int64)
            is_used[np.arange(_DRAWS)[:, None], chosen] = 1
            busiest = (is_used @ holds[0].astype(np.int64)).max(axis=1)
            self._distinct[key] = float(busiest.mean()) * num_layers
        return self._distinct[key]

    def _distinct_of_trace(self, trace: Trace, num_seqs: int, holds: Array) -> float:
        key = num_seqs, holds.tobytes()
        if key not in self._distinct:
            rank_of_expert = holds.argmax(axis=2)
            total = 0
            for step in replay_steps(trace, batched_steps(trace, _checked(trace, num_seqs))):
                for layer, union in enumerate(step.unions):
                    total += int(np.bincount(rank_of_expert[layer, union]).max())
            self._distinct[key] = total / trace.num_tokens * num_seqs
        return self._distinct[key]

    def _missed_of_trace(self, trace: Trace, num_seqs: int, slots: int) -> float:
        shape = cache_shape(trace, slots, "layer")
        key = num_seqs, shape
        if key not in self._missed:
            policy = plugin.load(POLICIES, self.eviction).build(shape)
            steps = batched_steps(trace, _checked(trace, num_seqs))
            result = replay(trace, steps, shape, policy, with_counts=True)
            self._missed[key] = result.misses / trace.num_tokens * num_seqs
        return self._missed[key]


def demand_of(spec: ModelSpec, trace: Trace | None, eviction: str) -> ExpertDemand:
    """Return what a model's steps need. Raises ConfigError for a trace of another model."""
    layers = moe_layers(spec)
    if not layers:
        if trace is not None:
            raise ConfigError("the model is dense: a trace has no effect; leave --trace out")
        return ExpertDemand(np.empty((0, 0)))
    routers = [moe.router for layer in spec.layers if (moe := layer.moe) is not None]
    shape = (
        len(layers),
        max(router.num_experts for router in routers),
        max(router.top_k for router in routers),
    )
    if trace is None:
        return ExpertDemand(chances_of(None, *shape))
    of_trace = (trace.num_layers, trace.num_experts, trace.top_k)
    if of_trace != shape:
        raise ConfigError(
            f"trace {trace.name} has {of_trace[0]} layers of {of_trace[1]} experts, top-"
            f"{of_trace[2]}, and the model {shape[0]} of {shape[1]}, top-{shape[2]}; record one of "
            "this model with moe-serve trace"
        )
    if trace.num_tokens == 0:
        raise ConfigError(f"trace {trace.name} has no tokens; record a longer one")
    layers_ids = trace.ids.reshape(trace.num_tokens, trace.num_layers, -1).transpose(1, 0, 2)
    uses = np.stack([np.bincount(ids.ravel(), minlength=shape[1]) for ids in layers_ids])
    return ExpertDemand(chances_of(uses, *shape), trace, eviction)


def _checked(trace: Trace, num_seqs: int) -> int:
    if num_seqs > trace.num_seqs:
        raise ConfigError(
            f"trace {trace.name} has {trace.num_seqs} sequences, and {num_seqs} are to run at "
            f"once; record more of them, or give --num-seqs {trace.num_seqs}"
        )
    return num_seqs
