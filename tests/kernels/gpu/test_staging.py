"""Small tensors on their way: whole, in one copy, and not overwritten while they travel."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_serve.kernels.gpu.staging import Incoming, Layout, Outgoing
from tests.kernels.gpu.late_streams import LateStreams


def test_tensors_of_a_layout_do_not_share_and_are_aligned() -> None:
    layout = Layout(
        {"a": (torch.int64, (3,)), "b": (torch.float32, (2, 5)), "none": (torch.int32, (0,)),
         "c": (torch.uint8, (1,))}
    )  # fmt: skip
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = layout.views(memory)
    for number, view in enumerate(views.values()):
        view.fill_(number + 1)
        assert not view.numel() or (view.data_ptr() - memory.data_ptr()) % 256 == 0
    assert views["a"].tolist() == [1, 1, 1]
    assert views["b"].tolist() == [[2] * 5] * 2
    assert views["none"].shape == (0,)
    assert views["c"].tolist() == [4]


def test_a_call_s_tensors_go_in_one_copy() -> None:
    streams = LateStreams()
    given = [torch.arange(5), torch.ones(2, 3)[:, :2], torch.zeros(0)]
    sent = Outgoing(streams).tensors(given)
    assert len(streams.copies) == 1
    streams.finish()
    for one, other in zip(sent, given, strict=True):
        assert torch.equal(one, other)
    assert Outgoing(streams).tensors([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_what_is_on_its_way_is_not_overwritten(seed: int) -> None:
    streams = LateStreams(seed)
    outgoing = Outgoing(streams)
    given = [torch.full((size,), size) for size in (3, 9, 1, 300, 40, 2, 5, 700, 8, 8, 8, 8)]
    sent = [outgoing.tensors([one])[0] for one in given]
    streams.finish()
    for one, other in zip(sent, given, strict=True):
        assert torch.equal(one, other)


class Counted(LateStreams):
    """Knows which of the pieces that it gave are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[weakref.ref[Any]] = []

    def pinned(self, num_bytes: int) -> Tensor:
        memory = np.zeros(num_bytes, np.uint8)
        self.pieces.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    @property
    def num_held(self) -> int:
        return sum(piece() is not None for piece in self.pieces)


def test_pieces_that_were_outgrown_are_given_back_once_they_are_sent() -> None:
    streams = Counted()
    outgoing = Outgoing(streams)
    layouts = [Layout({"a": (torch.int64, (size,))}) for size in (3, 70, 600, 5)]
    into = torch.zeros(8192, dtype=torch.uint8)
    for layout in [layout for layout in layouts for _ in range(9)]:
        memory = outgoing.memory(layout.num_bytes)
        views = outgoing.views(layout)
        assert views["a"].data_ptr() == memory.data_ptr()
        assert outgoing.views(layout) is views, "they are cut once"
        views["a"].fill_(layout.num_bytes)
        outgoing.send(memory, into[: layout.num_bytes])
        assert streams.num_held <= 4
    assert len(streams.pieces) == 12
    streams.finish()
    assert into[:40].view(torch.int64).tolist() == [layouts[-1].num_bytes] * 5
    del views, layout
    held = weakref.ref(layouts.pop(0))
    assert held() is None, "nor do views keep a layout"


def test_what_comes_is_waited_for() -> None:
    streams = LateStreams()
    incoming = Incoming(streams)
    for size in (2, 100, 5):
        source = torch.zeros(size, dtype=torch.int64)
        streams.kernels.launch(lambda source=source: source.fill_(7))  # type: ignore[misc]
        numbers, others = incoming.fetch([source, torch.ones(3)])
        assert numbers.tolist() == [7] * size
        assert others.tolist() == [1, 1, 1]
