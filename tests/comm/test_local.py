"""The local dispatcher: every pair reaches its expert and comes back to its place."""

from __future__ import annotations

import torch

from moe_serve.comm import local
from moe_serve.kernels.combine.reference import combine
from moe_serve.types import Routing


def test_pairs_are_sorted_by_expert_and_come_back() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 4)
    ids = torch.stack([torch.randperm(5)[:3] for _ in range(9)])
    routing = Routing(ids, torch.rand(9, 3))
    dispatcher = local.build(5, combine)
    inbox, receipt = dispatcher.dispatch(0, hidden, routing)
    assert inbox.counts == ids.flatten().bincount(minlength=5).tolist()
    # an "expert" that multiplies its rows with its number
    expert_of_pair = torch.repeat_interleave(torch.arange(5), torch.tensor(inbox.counts))
    outbox = inbox.rows[inbox.row_of_pair] * expert_of_pair[:, None]
    got = dispatcher.combine(outbox, receipt, None)
    want = hidden * (ids * routing.weights).sum(-1, keepdim=True)
    torch.testing.assert_close(got, want)


def test_no_tokens() -> None:
    dispatcher = local.build(3, combine)
    routing = Routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    inbox, receipt = dispatcher.dispatch(0, torch.empty(0, 4), routing)
    assert inbox.counts == [0, 0, 0]
    assert dispatcher.combine(torch.empty(0, 4), receipt, None).shape == (0, 4)
