"""That a wait for the device is found, also where the device is the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.host_sync import no_host_sync


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.masked_fill_(tensor > 0, 1.0).numpy(),
        lambda tensor: torch.bincount(tensor.long()),
    ],
)
def test_a_wait_is_found(wait: Callable[[Tensor], object]) -> None:
    tensor = torch.ones(3)
    with pytest.raises(AssertionError, match="wait"), no_host_sync():
        wait(tensor)


def test_other_work_is_let_through() -> None:
    tensor = torch.ones(3)
    with no_host_sync():
        tensor[torch.tensor([0, 2])] = tensor.topk(2).values
        torch.where(tensor > 0, tensor, 0.0).sum()
