"""The seam between routing and experts: what a dispatcher takes, gives, and remembers.

A dispatcher knows bytes and ranks, not models: `comm/local.py` is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from moe_serve.types import Routing


@dataclass(frozen=True, slots=True)
class Inbox:
    """What this rank must compute. Read it before the next dispatch: its rows' memory is kept.

    rows: [num_received, hidden_size]. row_of_pair: int64 [num_pairs], the row of each (token,
    expert) pair, pairs sorted by expert; counts: int64 [num_experts], pairs of each expert, 0 for
    those of other ranks. returns: "rows", one result per pair, or "sums", one per row, already
    weighted by `weights` (float32 [num_pairs], else None). has_room: whether `row_of_pair` may be
    longer than there are pairs, which only the device knows then: see `kernels.exchange.Unpacked`.
    """

    rows: Tensor
    row_of_pair: Tensor
    counts: Tensor
    weights: Tensor | None = None
    returns: Literal["rows", "sums"] = "rows"
    has_room: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `combine` needs to undo a dispatch: where each token's choices are, and their weights.

    pair_of_choice: int64 [num_tokens, top_k]; weights: float32 [num_tokens, top_k].
    """

    pair_of_choice: Tensor
    weights: Tensor


class Dispatcher(Protocol):
    """Carry tokens to their experts and the results back. Collective where there are ranks.

    has_ranks: others wait for this one's part in every layer.
    """

    @property
    def has_ranks(self) -> bool: ...

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """Say how many tokens every rank has in the step that begins, [num_ranks]."""
        ...

    def dispatch(
        self,
        layer: int,
        hidden: Tensor,
        routing: Routing,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[Inbox, Receipt]:
        """Send each token, a row of `hidden` [num_tokens, hidden_size], to its experts.

        layer: by the model's number. meanwhile: called once, while rows are on their way.
        """
        ...

    def combine(
        self,
        outbox: Tensor,
        receipt: Receipt,
        shared: Tensor | None = None,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        """Return each token's weighted sum, [num_tokens, hidden_size].

        outbox: [num_pairs, hidden_size] in the inbox's order; shared, shared_weights: the shared
        expert's rows and what they are weighed by, as in the `combine` kernel.
        """
        ...
