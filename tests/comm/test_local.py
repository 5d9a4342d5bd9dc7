"""The local dispatcher: every pair reaches its expert and comes back to its place."""

from __future__ import annotations

import torch

from moe_serve.comm import local
from moe_serve.types import Routing
from tests.kernels.implementations import EACH, kernels
from tests.kernels.row_independence import same_bits


def _dispatcher(name: str, num_experts: int) -> local.LocalDispatcher:
    return local.build(num_experts, kernels(name))


@EACH
def test_pairs_are_sorted_by_expert_and_come_back(name: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 4)
    ids = torch.stack([torch.randperm(5)[:3] for _ in range(9)])
    routing = Routing(ids, torch.rand(9, 3))
    dispatcher = _dispatcher(name, 5)
    inbox, receipt = dispatcher.dispatch(0, hidden, routing)
    assert inbox.counts.tolist() == ids.flatten().bincount(minlength=5).tolist()
    # an "expert" that multiplies its rows with its number
    expert_of_pair = torch.repeat_interleave(torch.arange(5), inbox.counts)
    outbox = inbox.rows[inbox.row_of_pair] * expert_of_pair[:, None]
    got = dispatcher.combine(outbox, receipt)
    want = hidden * (ids * routing.weights).sum(-1, keepdim=True)
    torch.testing.assert_close(got, want)
    shared, factors = torch.randn(9, 4), torch.rand(9)
    got = dispatcher.combine(outbox, receipt, shared, factors)
    torch.testing.assert_close(got, want + shared * factors[:, None])


@EACH
def test_what_is_dispatched_is_not_copied(name: str) -> None:
    hidden = torch.randn(6, 4)
    routing = Routing(torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1))
    dispatcher = _dispatcher(name, 1)
    inbox, receipt = dispatcher.dispatch(0, hidden, routing)
    assert inbox.rows is hidden
    assert inbox.returns == "rows"
    assert same_bits(dispatcher.combine(inbox.rows[inbox.row_of_pair], receipt), hidden)


@EACH
def test_no_tokens(name: str) -> None:
    dispatcher = _dispatcher(name, 3)
    routing = Routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    inbox, receipt = dispatcher.dispatch(0, torch.empty(0, 4), routing)
    assert inbox.counts.tolist() == [0, 0, 0]
    assert dispatcher.combine(torch.empty(0, 4), receipt).shape == (0, 4)
