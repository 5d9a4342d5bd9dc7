"""What an eviction policy decides: which resident experts are needed least."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheShape:
    """How many experts there are, and how many slots for them.

    slots_per_layer: the slots of each layer, or None where layers share `total_slots`.
    """

    num_layers: int
    num_experts: int
    slots_per_layer: int | None
    total_slots: int

    def with_slots(self, per_layer: int) -> CacheShape:
        """Return the same with `per_layer` slots for each layer, or as many in all if shared."""
        is_shared = self.slots_per_layer is None
        return CacheShape(
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            slots_per_layer=None if is_shared else per_layer,
            total_slots=per_layer * self.num_layers,
        )


class EvictionPolicy(ABC):
    """An order over resident experts, kept up by what is used.

    One event is (step, layer) with the union of the experts that the step's tokens use. The cache
    calls `touch` once per event, when its hits and misses are settled, and then `victims`, if the
    misses need room. A policy sees every use, of experts that are not resident too; it never sees
    what is resident but through `candidates`.
    """

    @property
    def is_selective(self) -> bool:
        """Whether its scores tell if a missing expert should stay in place of a resident one.

        The cache then lets those that should not pass through, where it otherwise admits all.
        """
        return False

    @abstractmethod
    def touch(self, step: int, layer: int, expert_ids: Sequence[int]) -> None:
        """Take note of one event. expert_ids: its union, sorted; steps never go back."""

    @abstractmethod
    def scores(self, layer: int, expert_ids: Sequence[int]) -> Sequence[float]:
        """Return how much each of these experts of `layer` should stay: the lowest goes first.

        Comparable between layers, since layers may share slots.
        """

    def victims(self, layer: int, candidates: Sequence[int], count: int) -> list[int]:
        """Return the `count` of `candidates`, sorted expert ids of `layer`, that should go.

        The first should go first; ties go to the lower id.
        """
        scores = self.scores(layer, candidates)
        if count == 1:
            return [candidates[min(range(len(candidates)), key=scores.__getitem__)]]
        order = sorted(range(len(candidates)), key=scores.__getitem__)  # stable
        return [candidates[index] for index in order[:count]]

    def admits(self, layer: int, expert: int) -> bool:
        """Return whether a missing expert is worth a slot; otherwise it is served where it lies.

        True for all policies but those that hold a fixed set.
        """
        return True

    def resize(self, shape: CacheShape) -> None:  # noqa: B027 - most do not count slots
        """Take note that there are other numbers of slots from now on, and nothing else."""

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return what a later run may start from; {} where nothing was learned."""
        return {}
