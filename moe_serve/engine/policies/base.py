"""What a scheduling policy decides: an order over requests, and how much of a step prompts get."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from moe_serve.types import Request


class Policy(ABC):
    """An order that is fixed for a request's life, and a share of each step for prompts.

    The order is used from both ends: the first waiting sequence is admitted next, the last running
    one is preempted when blocks run out. It never changes, so the first of all that run is nobody's
    victim and goes on to its end: no schedule can stand still. A policy that ages requests says so
    in the rank itself: both age alike, hence their order stays.
    """

    reads_priority: ClassVar[bool] = False  # whether a request's priority means anything

    @abstractmethod
    def rank(self, request: Request, arrival_s: float) -> float:
        """Return where the request stands: a lower rank runs earlier; ties go to the older one.

        arrival_s: when it was added, on the scheduler's clock.
        """

    def prompt_tokens(self, budget: int, num_decodes: int) -> int:
        """Return the most prompt tokens in a step of `budget` tokens with `num_decodes` decodes."""
        return budget - num_decodes
