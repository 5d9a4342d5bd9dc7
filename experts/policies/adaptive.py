"""Adaptive: follows whichever of lru, lfu, lfru and learned has missed least of late.

Each of the four has a shadow cache, which holds names only, in a few of the layers. Their misses,
counted with fading, say whom to follow; so a policy that does not suit what runs now costs little
more than the time until the shadows show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_serve.experts.policies import learned, lfru, lfu, lru
from moe_serve.experts.policies.base import CacheShape, EvictionPolicy

Array = np.ndarray[Any, Any]

_FOLLOWED = (lfru, lru, lfu)  # and learned; the first is followed until there is evidence
_SHADOW_LAYERS = 4
_KEEP = 0.998  # of the counted misses, per step: some 500 steps count
_MARGIN = 0.995  # another is followed when its misses are below this share of the present one's
_EVIDENCE = 200.0  # misses of the policy that is followed, before another one is


class Adaptive(EvictionPolicy):
    """Tells all four policies of every event, and asks one."""

    def __init__(self, shape: CacheShape, state: Mapping[str, Array] | None) -> None:
        self._learned = learned.build(shape, state)
        self._policies: list[EvictionPolicy] = [
            *(module.build(shape) for module in _FOLLOWED),
            self._learned,
        ]
        self._followed = self._policies[0]
        self._misses = [0.0] * len(self._policies)  # of the shadows, fading
        num_shadowed = min(_SHADOW_LAYERS, shape.num_layers)
        layers = [(2 * i + 1) * shape.num_layers // (2 * num_shadowed) for i in range(num_shadowed)]
        self._shadows = {layer: [_Shadow(policy) for policy in self._policies] for layer in layers}
        self._slots = _slots_of_a_layer(shape)
        self._step = -1

    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        if step != self._step:
            self._step = step
            self._choose()
        for policy in self._policies:
            policy.touch(step, layer, expert_ids)
        if layer in self._shadows:
            for index, shadow in enumerate(self._shadows[layer]):
                self._misses[index] += shadow.serve(layer, expert_ids, self._slots)

    @property
    def is_selective(self) -> bool:
        return self._followed.is_selective

    def scores(self, layer: int, expert_ids: Sequence[int]) -> Sequence[float]:
        return self._followed.scores(layer, expert_ids)

    def victims(self, layer: int, candidates: Sequence[int], count: int) -> list[int]:
        return self._followed.victims(layer, candidates, count)

    def resize(self, shape: CacheShape) -> None:
        self._slots = _slots_of_a_layer(shape)

    def state(self) -> dict[str, Array]:
        return self._learned.state()

    def _choose(self) -> None:
        """Follow the policy with the fewest misses, if they are clearly fewer."""
        misses = self._misses = [count * _KEEP for count in self._misses]
        present = misses[self._policies.index(self._followed)]
        best = min(misses)
        if present >= _EVIDENCE and best < _MARGIN * present:
            self._followed = self._policies[misses.index(best)]


class _Shadow:
    """The experts of one layer that would be resident if one policy were followed."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._residents: set[int] = set()

    def serve(self, layer: int, expert_ids: Sequence[int], slots: int) -> int:
        """Serve an event after `touch`; return its misses."""
        residents = self._residents
        misses = [expert for expert in expert_ids if expert not in residents]
        if misses and self._policy.is_selective:
            everyone = sorted(residents.union(expert_ids))
            surplus = max(0, len(everyone) - slots)
            going = self._policy.victims(layer, everyone, surplus) if surplus else []
            self._residents = set(everyone).difference(going)
        elif misses and len(expert_ids) > slots:
            going = self._policy.victims(layer, expert_ids, len(expert_ids) - slots)
            self._residents = set(expert_ids).difference(going)
        elif misses:
            surplus = len(residents) + len(misses) - slots
            if surplus > 0:
                others = sorted(residents.difference(expert_ids))
                residents.difference_update(self._policy.victims(layer, others, surplus))
            residents.update(misses)
        return len(misses)


def _slots_of_a_layer(shape: CacheShape) -> int:
    return shape.slots_per_layer or shape.total_slots // shape.num_layers


def build(shape: CacheShape, state: Mapping[str, Array] | None = None) -> Adaptive:
    """Make the policy; state: that of policy `learned`, which is what this one returns too."""
    return Adaptive(shape, state)
