"""Dispatchers on a GPU that is not there: all tensors are on it, and who waits for it is known.

torch's device "meta" is for shapes alone: it refuses to be mixed with another one, and to say what
is in a tensor. Kernels are not launched, and what is exchanged does not come. (torch's fake tensors
of CUDA cannot be sliced where torch was built without it.)
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.comm import _world
from moe_serve.comm._layout import Layout
from moe_serve.comm._world import World
from moe_serve.comm.base import Inbox
from moe_serve.errors import CommError
from moe_serve.kernels import suite
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.plugin import load
from moe_serve.types import Routing
from tests.comm.worker import NAMES, WITHOUT_WAITING
from tests.kernels.implementations import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and no GPU"),
    pytest.mark.usefixtures("_absent_gpu"),
]
ABSENT = torch.device("meta")
NUM_RANKS, NUM_EXPERTS, TOP_K, HIDDEN = 4, 8, 2, 32
HOLDERS = [(expert % NUM_RANKS, (expert + 1) % NUM_RANKS) for expert in range(NUM_EXPERTS)]


class ReadWorld(World):
    """Says that there is one of everything, where a GPU would be asked."""

    def read(self, *counts: Tensor) -> list[list[int]]:
        assert all(one.device == ABSENT for one in counts)
        self.num_waits += 1
        return [[1] * len(one) for one in counts]


def exchanged(out: Tensor, rows: Tensor, *args: Any, **kwargs: Any) -> None:
    assert out.device == rows.device == ABSENT
    assert out.is_contiguous()
    assert rows.is_contiguous()


def launched(executor: object, *args: Any, **kwargs: Any) -> None:
    assert all(arg.device == ABSENT for arg in args if isinstance(arg, Tensor))


@pytest.fixture
def _absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be launched or sent."""
    from triton.runtime.interpreter import GridExecutor  # which a machine may not have

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    stand_in = SimpleNamespace(
        get_rank=lambda group: 1,
        get_world_size=lambda group: NUM_RANKS,
        all_to_all_single=exchanged,
    )
    monkeypatch.setattr(_world, "dist", stand_in)


def through_a_layer(
    world: World, name: str, replica_choice: str = "nearest"
) -> tuple[Tensor, Inbox]:
    """Send two tokens to experts and back; return what became of them, and the inbox."""
    kernels = replace(suite.load("triton"), device=ABSENT)
    holders = [tuple(sorted(ranks)) for ranks in HOLDERS]
    # no rank is near another, so that replicas take turns
    layout = Layout([holders], NUM_RANKS, 1, (0,), 1, replica_choice, ABSENT)
    dispatcher = load("moe_serve.comm", name).build(world, layout, kernels)
    dispatcher.begin_step([2] * NUM_RANKS)
    hidden = torch.empty(2, HIDDEN, dtype=torch.bfloat16, device=ABSENT)
    ids = torch.empty(2, TOP_K, dtype=torch.int64, device=ABSENT)
    routing = Routing(ids, torch.empty(2, TOP_K, device=ABSENT))
    inbox, receipt = dispatcher.dispatch(0, hidden, routing)
    record_bytes = kernels.record_bytes(HIDDEN, 16, torch.bfloat16)
    table = ExpertTable(
        records=torch.empty(4, record_bytes, dtype=torch.uint8, device=ABSENT),
        slot_of_expert=torch.empty(NUM_EXPERTS, dtype=torch.int32, device=ABSENT),
        uses=torch.empty(NUM_EXPERTS, dtype=torch.int64, device=ABSENT),
        hidden_size=HIDDEN,
        intermediate_size=16,
        dtype=torch.bfloat16,
    )
    outbox = kernels.moe(inbox.rows, inbox.row_of_pair, inbox.counts, table)
    return dispatcher.combine(outbox, receipt), inbox


@pytest.mark.parametrize("name", NAMES)
def test_all_is_on_the_gpu_and_waits_are_counted(name: str) -> None:
    world = ReadWorld(None, ABSENT)  # type: ignore[arg-type]
    combined, inbox = through_a_layer(world, name)
    assert combined.device == inbox.rows.device == inbox.counts.device == ABSENT
    assert combined.shape == (2, HIDDEN)
    assert world.num_waits == (0 if name in WITHOUT_WAITING else 1)
    assert world.exchange_s is None
    assert inbox.has_room == (name in WITHOUT_WAITING)


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_a_graph_can_hold_what_asks_the_gpu_for_nothing(name: str) -> None:
    """From dispatch to combine; what was counted is asked for later."""
    world = World(None, ABSENT)  # type: ignore[arg-type]
    through_a_layer(world, name)
    with pytest.raises(NotImplementedError, match="no data"):
        print(world.pairs_sent)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_WAITING])
def test_others_ask_it(name: str) -> None:
    with pytest.raises(CommError, match="no data"):
        through_a_layer(World(None, ABSENT), name)  # type: ignore[arg-type]


def test_replicas_that_are_filled_are_one_more_question() -> None:
    world = ReadWorld(None, ABSENT)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="no data"):
        through_a_layer(world, "static", "water_filling")
    assert world.num_waits == 1
