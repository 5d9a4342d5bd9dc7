"""The fastest of the dispatchers for each step, by times measured at start; of the exact ones alone
unless others are allowed.

Every rank times each of them on some sizes, and ranks exchange their times, so that all choose
alike from the step's token counts, and nobody has to tell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.comm import all_gather, dedup, dedup_sums, per_expert, static, static_sums
from moe_serve.comm._between import Meanwhile
from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.comm.base import Dispatcher, Inbox, Receipt
from moe_serve.kernels.suite import Kernels
from moe_serve.types import Routing

_EXACT = (per_expert, dedup, all_gather, static)
_SUMS = (dedup_sums, static_sums)
# tokens a rank; the last beyond static's slots, whose rounds begin there
_SIZES = (1, 8, 64, 256)
_SAMPLES = 3
_REPEATS = 3  # calls a sample: ranks do not begin the first at once


class Auto:
    """See `comm.base.Dispatcher`. Until `fit` was called it is per_expert.

    num_steps: by name, in how many each was chosen.
    """

    has_ranks = True

    def __init__(
        self, world: World, layout: Layout, kernels: Kernels, with_sums: bool = False
    ) -> None:
        self._world = world
        self._layout = layout
        self.candidates: dict[str, Dispatcher] = {
            module.__name__.rpartition(".")[2]: module.build(world, layout, kernels)
            for module in (*_EXACT, *(_SUMS if with_sums else ()))
        }
        self._times_s: dict[str, list[float]] = {}
        self.chosen = "per_expert"
        self.num_steps = dict.fromkeys(self.candidates, 0)

    def fit(self, layer: int, hidden: Tensor, top_k: int) -> dict[str, list[float]]:
        """Time every candidate; return the seconds of the slowest rank at each size, by name.

        All ranks must call it at once. layer: by the model's number; hidden: [1, hidden_size], of
        the model's dtype.
        """
        num_experts = self._layout.num_experts
        source = torch.Generator().manual_seed(self._world.rank)
        found = []
        for num_tokens in _SIZES:
            ids = torch.rand(num_tokens, num_experts, generator=source).argsort(1)[:, :top_k]
            weights = torch.full((num_tokens, top_k), 1.0 / top_k)
            routing = Routing(ids.to(hidden.device), weights.to(hidden.device))
            rows = hidden.expand(num_tokens, -1).contiguous()
            # in turns, so that what else the machine does meets all alike; the first warms up
            samples = [
                [self._time_s(one, layer, rows, routing) for one in self.candidates.values()]
                for _ in range(1 + _SAMPLES)
            ]
            found.append(samples[1:])
        mine = torch.tensor(found, dtype=torch.float64)  # [sizes, samples, candidates]
        each = self._world.exchange_evenly(mine.view(1, -1).repeat(self._world.size, 1))
        slowest = each.max(0).values.view(mine.shape)
        # the lower quartile: a core lent to others costs more than candidates differ by
        typical = slowest.sort(1).values[:, _SAMPLES // 4]
        self._times_s = dict(zip(self.candidates, typical.T.tolist(), strict=True))
        return self._times_s

    def forget_steps(self) -> None:
        """Count steps from now on."""
        self.num_steps = dict.fromkeys(self.candidates, 0)

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        """Choose for the rank with most tokens: the others wait for it anyway."""
        if self._times_s:
            most = max(num_tokens)
            self.chosen = min(self._times_s, key=lambda name: seconds_at(most, self._times_s[name]))
        self.num_steps[self.chosen] += 1
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
        for _ in range(_REPEATS):
            dispatcher.begin_step([rows.shape[0]] * self._world.size)
            inbox, receipt = dispatcher.dispatch(layer, rows, routing)
            combined = dispatcher.combine(inbox.rows[inbox.row_of_pair], receipt)
        combined[0, 0].item()  # of a GPU all that was asked is done then
        return (time.perf_counter() - start_s) / _REPEATS


def seconds_at(num_tokens: int, times_s: Sequence[float]) -> float:
    """Return the time at so many tokens: on straight lines between `_SIZES`, on the last beyond."""
    last = sum(num_tokens > size for size in _SIZES[1:-1])
    few, many = _SIZES[last], _SIZES[last + 1]
    per_token = max(0.0, (times_s[last + 1] - times_s[last]) / (many - few))
    return times_s[last] + (num_tokens - few) * per_token


def build(world: World, layout: Layout, kernels: Kernels, with_sums: bool = False) -> Auto:
    """Build the dispatcher of this rank; `fit` it before the first step.

    with_sums: also choose among those that are not exact.
    """
    return Auto(world, layout, kernels, with_sums)
