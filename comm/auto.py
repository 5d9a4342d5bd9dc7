"""The fastest of the exact dispatchers for each step, by times measured at start.

Every rank times each of them on two sizes, ranks exchange their times and fit the same line, so
that all choose alike from the step's token counts, and nobody has to tell.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.comm import all_gather, dedup, per_expert, static
from moe_serve.comm._between import Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.comm.base import Dispatcher, Inbox, Receipt
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing

_SIZES = (1, 64)  # tokens a rank
_SAMPLES = 9


class Auto:
    """See `comm.base.Dispatcher`. Until `fit` was called it is per_expert."""

    def __init__(self, world: World, layout: Layout, kernels: Kernels) -> None:
        self._world = world
        self._layout = layout
        self.candidates: dict[str, Dispatcher] = {
            module.__name__.rpartition(".")[2]: module.build(world, layout, kernels)
            for module in (per_expert, dedup, all_gather, static)
        }
        self._lines: dict[str, tuple[float, float]] = {}
        self.chosen = "per_expert"

    def fit(self, layer: int, hidden: Tensor, top_k: int) -> dict[str, tuple[float, float]]:
        """Time every candidate; return seconds at no token, and for each more, by name.

        All ranks must call it at once. layer: by the model's number; hidden: [1, hidden_size], of
        the model's dtype.
        """
        num_experts = self._layout.num_experts
        source = torch.Generator().manual_seed(self._world.rank)
        found = []
        for num_tokens in _SIZES:
            ids = torch.rand(num_tokens, num_experts, generator=source).argsort(1)[:, :top_k]
            routing = Routing(ids, torch.full((num_tokens, top_k), 1.0 / top_k))
            rows = hidden.expand(num_tokens, -1).contiguous()
            # in turns, so that what else the machine does meets all alike; the first warms up
            samples = [
                [self._time_s(one, layer, rows, routing) for one in self.candidates.values()]
                for _ in range(1 + _SAMPLES)
            ]
            found.append([statistics.median(times) for times in zip(*samples[1:], strict=True)])
        mine = torch.tensor(found, dtype=torch.float64).T.reshape(1, -1)
        each = self._world.exchange_evenly(mine.repeat(self._world.size, 1))
        slowest = each.max(0).values.view(-1, len(_SIZES)).tolist()
        few, many = _SIZES
        for name, (short_s, long_s) in zip(self.candidates, slowest, strict=True):
            per_token = max(0.0, (long_s - short_s) / (many - few))
            self._lines[name] = short_s - few * per_token, per_token
        return dict(self._lines)

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """Choose for the rank with most tokens: the others wait for it anyway."""
        if self._lines:
            most = max(num_tokens)
            self.chosen = min(
                self._lines, key=lambda name: self._lines[name][0] + most * self._lines[name][1]
            )
        self.candidates[self.chosen].begin_step(num_tokens)

    def dispatch(
        self, layer: int, hidden: Tensor, routing: Routing, meanwhile: Meanwhile = None
    ) -> tuple[Inbox, Receipt]:
        return self.candidates[self.chosen].dispatch(layer, hidden, routing, meanwhile)

    def combine(
        self,
        outbox: Tensor,
        receipt: Receipt,
        shared: Tensor | None = None,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        return self.candidates[self.chosen].combine(outbox, receipt, shared, shared_weights)

    def _time_s(self, dispatcher: Dispatcher, layer: int, rows: Tensor, routing: Routing) -> float:
        start_s = time.perf_counter()
        dispatcher.begin_step([rows.shape[0]] * self._world.size)
        inbox, receipt = dispatcher.dispatch(layer, rows, routing)
        dispatcher.combine(inbox.rows[inbox.row_of_pair], receipt)
        return time.perf_counter() - start_s


def build(world: World, layout: Layout, kernels: Kernels) -> Auto:
    """Build the dispatcher of this rank; `fit` it before the first step."""
    return Auto(world, layout, kernels)
