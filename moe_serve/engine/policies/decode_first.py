"""First come, first served; prompts get only a small share of a step while anything decodes."""

from __future__ import annotations

from moe_serve.engine.policies.base import Policy
from moe_serve.types import Request

PROMPT_SHARE = 8
"""One token in this many of a step's budget may be a prompt's while anything decodes."""


class DecodeFirst(Policy):
    """Order of arrival; while a sequence decodes, prompts get at most an eighth of the budget.

    The lowest time between tokens, paid for with a later first token. With nothing decoding,
    prompts get the whole step.
    """

    def rank(self, request: Request, arrival_s: float) -> float:
        return arrival_s

    def prompt_tokens(self, budget: int, num_decodes: int) -> int:
        if num_decodes == 0:
            return budget
        return min(budget - num_decodes, max(1, budget // PROMPT_SHARE))


def build() -> Policy:
    """Make the policy."""
    return DecodeFirst()
