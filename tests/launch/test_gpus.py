"""Which GPU a rank takes, and that there is one for each."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from moe_serve.errors import ConfigError
from moe_serve.launch import gpus
from tests.launch.test_environment import PLACE


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The GPUs that were taken, of a machine that has four, and NCCL."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    return taken


def test_each_rank_takes_that_of_its_number_on_its_machine(taken: list[int]) -> None:
    gpus.take_gpu(PLACE)  # rank 5 of 8, the second of four on the second machine
    assert taken == [1]


def test_more_ranks_than_gpus_are_refused_with_the_numbers(taken: list[int]) -> None:
    place = dataclasses.replace(PLACE, world_size=5, local_world_size=5, rank=1)
    with pytest.raises(ConfigError, match=r"5 ranks on this machine, but 4 .*CUDA_VISIBLE_DEVICES"):
        gpus.take_gpu(place)
    assert taken == []


def test_a_rank_alone_needs_no_nccl(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    gpus.check_gpus(1)
    with pytest.raises(ConfigError, match="NCCL"):
        gpus.check_gpus(2)
