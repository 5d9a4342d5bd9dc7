"""That a device which is far counts what the host waits for, and gives what a CPU gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_serve.kernels.gpu.staging import Shuttle
from tests.kernels.gpu.far_device import FAR, FarStreams, FarTensor, far, far_device, near


@pytest.mark.parametrize(
    "wait",
    [
        lambda one: one[0].item(),
        lambda one: bool(one.any()),
        lambda one: one.tolist(),
        lambda one: one.cpu(),
        lambda one: one.to("cpu"),
        lambda one: one.numpy(),
        lambda one: one.nonzero(),
        lambda one: one[one > 0],
        lambda one: one[[0, 2]],
        lambda one: one[torch.tensor([0, 2])],
        lambda one: one.copy_(torch.zeros(3)),
        lambda one: torch.tensor([1.0], device=one.device),
        lambda one: torch.from_numpy(np.zeros(3)).to(one.device),
    ],
    ids=range(13),
)
def test_a_wait_is_counted(wait: Callable[[Tensor], object]) -> None:
    with torch.inference_mode(), far_device() as waits:
        one = far(torch.arange(3.0))
        wait(one)
        assert len(waits.reasons) == 1


def test_other_work_is_not() -> None:
    with torch.inference_mode(), far_device() as waits:
        one = far(torch.arange(3.0))
        rows = far(torch.tensor([2, 0]))
        one[rows] = one[rows] * 2 + torch.ones(2, device=FAR)
        one[:1].masked_fill_(one[:1] > 0, 7.0)
        best = torch.cat([one.view(torch.uint8), one.argmax(-1, keepdim=True).view(torch.uint8)])
        assert isinstance(best, FarTensor)
        assert best.device == FAR
        assert waits.reasons == []
    assert near(one).tolist() == [7, 1, 5]
    assert near(best).tolist()[12:] == [0] * 8


def test_tensors_of_both_kinds_do_not_mix() -> None:
    with torch.inference_mode(), far_device(), pytest.raises(AssertionError, match="mixes"):
        far(torch.arange(3.0)) + torch.ones(3)


def test_values_go_in_one_copy_and_come_back_with_one_wait() -> None:
    value = (torch.tensor([True, False, True]), None, (torch.arange(3), 5, torch.ones(3, 2)[:, :1]))
    with torch.inference_mode(), far_device() as waits:
        streams = FarStreams(waits)
        shuttle = Shuttle(streams)
        for number in range(6):  # as many as there are turns, and more
            sent = shuttle.sent(value)
            assert isinstance(sent[0], FarTensor)
            assert (sent[1], sent[2][1]) == (None, 5)
            assert waits.reasons == ["event"] * number
            back = shuttle.fetched((*sent, torch.empty(4, 0, device=FAR)))
            assert waits.reasons == ["event"] * (number + 1)
            assert streams.num_copies == 2 * number + 2
            assert back[0].tolist() == [True, False, True]
            assert back[2][0].tolist() == [0, 1, 2]
            assert back[2][2].tolist() == [[1], [1], [1]]
            assert back[3].shape == (4, 0)
        assert shuttle.fetched((None, 3)) == (None, 3)
