"""A step alone: every dispatcher gives this rank's experts rows, and reaches nobody."""

from __future__ import annotations

import random
from unittest.mock import Mock

import pytest
import torch

from moe_serve.comm._layout import Layout
from moe_serve.comm._rehearsal import Rehearsal, Spread
from moe_serve.comm._replica_choice import CHOICES
from moe_serve.plugin import load
from moe_serve.types import Routing
from tests.comm.worker import COLLECTIVES, HIDDEN, LAYERS, placement_of
from tests.kernels.implementations import EACH_EXACT, INTERPRETED, kernels

CPU = torch.device("cpu")
NUM_EXPERTS, TOP_K = 16, 3


@EACH_EXACT
@pytest.mark.parametrize("dispatcher", COLLECTIVES)
@pytest.mark.parametrize("choice", CHOICES)
def test_rows_come_for_the_experts_that_are_here(name: str, dispatcher: str, choice: str) -> None:
    num_ranks, rank = 3, 1
    placement = placement_of(random.Random(3), NUM_EXPERTS, num_ranks)
    layout = Layout(placement.ranks, num_ranks, 1, LAYERS, rank, choice)
    world = Rehearsal(rank, num_ranks, CPU)
    module = load("moe_serve.comm", dispatcher)
    given = Spread(module.build(world, layout, kernels(name)), layout)
    for num_tokens in (1, 4) if name in INTERPRETED else (1, 4, 70):
        given.begin_step([num_tokens] * num_ranks)
        for layer in LAYERS:
            hidden = torch.ones(num_tokens, HIDDEN)
            # as of tokens that are alike: all choose the same, which nobody here may have
            alike = Routing(
                torch.arange(TOP_K).repeat(num_tokens, 1), torch.full((num_tokens, TOP_K), 0.5)
            )
            meanwhile = Mock()
            inbox, receipt = given.dispatch(layer, hidden, alike, meanwhile)
            meanwhile.assert_called_once_with()
            held = layout.held(layer).tolist()
            assert int(inbox.counts[held].sum()) == int(inbox.counts.sum()) > 0
            if num_tokens * TOP_K >= NUM_EXPERTS and choice == "nearest":
                assert bool((inbox.counts[held] > 0).all())
            rows = inbox.rows[inbox.row_of_pair]
            assert bool(rows[: int(inbox.counts.sum())].eq(1).all())
            combined = given.combine(torch.ones_like(rows), receipt)
            assert combined.shape == hidden.shape
            assert bool(combined.isfinite().all())
    assert world.bytes_sent > 0  # by its own count, which is thrown away with it
