"""First come, first served."""

from __future__ import annotations

from moe_serve.engine.policies.base import Policy
from moe_serve.types import Request


class FirstComeFirstServed(Policy):
    """Order of arrival."""

    def rank(self, request: Request, arrival_s: float) -> float:
        return arrival_s


def build() -> Policy:
    """Make the policy."""
    return FirstComeFirstServed()
