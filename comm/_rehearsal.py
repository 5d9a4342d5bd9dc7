"""A world without the others: a rank goes through a step alone, before it meets them.

What runs for the first time may be compiled for minutes where nothing is cached, and ranks that
wait for each other give up sooner. Alone, there is nobody to wait for, and none to be told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.comm.base import Dispatcher, Inbox, Receipt
from moe_serve.types import Routing


class Rehearsal(World):
    """See `World`: as if every rank sent here what this one sends to itself.

    So rows that come are for experts that are here, and as many as were told of. Of results, as
    many come as are awaited, of no meaning, but finite.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self._begin(rank, size, device)

    def _all_to_all(
        self,
        out: Tensor,
        rows: Tensor,
        in_rows: list[int] | None,
        out_rows: list[int] | None,
        meanwhile: Callable[[], None] | None,
    ) -> None:
        if meanwhile is not None:
            meanwhile()
        mine = torch.split(rows, out_rows or rows.shape[0] // self.size)[self.rank]
        for part in torch.split(out, in_rows or out.shape[0] // self.size):
            both = min(len(part), len(mine))
            part[:both] = mine[:both]
            part[both:] = 0


class Spread:
    """A dispatcher of a rehearsal: tokens go to all experts in turn, first those that are here.

    Tokens of nobody are alike, and would all choose the same experts, which may be elsewhere.
    """

    has_ranks = True

    def __init__(self, inner: Dispatcher, layout: Layout) -> None:
        self._inner = inner
        self._layout = layout

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        self._inner.begin_step(num_tokens)

    def dispatch(
        self,
        layer: int,
        hidden: Tensor,
        routing: Routing,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[Inbox, Receipt]:
        held, ids = self._layout.held(layer), routing.expert_ids
        is_elsewhere = torch.ones(self._layout.num_experts, device=ids.device)
        is_elsewhere[held] = 0
        order = is_elsewhere.argsort(stable=True)  # [num_experts]
        turn = torch.arange(ids.numel(), device=ids.device) % len(order)
        spread = Routing(order[turn].view(ids.shape), routing.weights)
        return self._inner.dispatch(layer, hidden, spread, meanwhile)

    def combine(
        self,
        outbox: Tensor,
        receipt: Receipt,
        shared: Tensor | None = None,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        return self._inner.combine(outbox, receipt, shared, shared_weights)
