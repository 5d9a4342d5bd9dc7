"""Lower priority numbers first, with aging."""

from __future__ import annotations

from moe_serve.engine.policies.base import Policy
from moe_serve.types import Request

AGING_S = 10.0
"""Seconds of waiting that are worth one level of priority."""


class Priority(Policy):
    """The lower `Request.priority` first; a level is worth `AGING_S` seconds of waiting.

    So a request is overtaken only by those that arrive within AGING_S seconds per level of
    difference after it: nothing starves.
    """

    reads_priority = True

    def rank(self, request: Request, arrival_s: float) -> float:
        return arrival_s + request.priority * AGING_S


def build() -> Policy:
    """Make the policy."""
    return Priority()
