"""Which GPU a rank takes, that there is one for each, and how they are connected."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_serve.config import EngineConfig
from moe_serve.errors import ConfigError
from moe_serve.kernels import suite
from moe_serve.launch import gpus, rendezvous
from moe_serve.launch.open import worlds_of
from moe_serve.launch.rank import open_worker
from tests.kernels.implementations import TRITON
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


@pytest.mark.parametrize("name", ["auto", "reference", *(["triton"] if TRITON else [])])
def test_the_device_is_that_of_the_kernels(name: str) -> None:
    assert suite.device_of(name) == suite.load(name).device


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")], ids=["cpu", "cuda"]
)
def test_rows_of_a_gpu_travel_over_nccl_and_the_rest_over_gloo(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "new_group", lambda **given: asked.append(given))
    monkeypatch.setattr(rendezvous, "World", lambda group, device: device)
    found: Any = rendezvous.Rendezvous(PLACE, None).ranks(torch.device(device))
    assert [given["backend"] for given in asked] == [backend]
    assert found.world == torch.device(device)


def test_a_rank_takes_its_gpu_first_and_says_where_it_cannot(
    taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []

    class Meeting:
        environment = PLACE

        def ranks(self, device: torch.device) -> None:
            said.append((device, list(taken)))
            raise ConfigError("seen enough")

        def refuse(self, error: Exception) -> None:
            said.append(str(error))

    gpu = torch.device("cuda")
    monkeypatch.setattr(suite, "device_of", lambda *names: gpu)
    meeting: Any = Meeting()
    with pytest.raises(ConfigError, match="seen enough"):
        open_worker(EngineConfig(), Path(), meeting)
    assert said == [(gpu, [1]), "seen enough"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match="but 3 of its GPUs"):
        open_worker(EngineConfig(), Path(), meeting)
    assert "but 3 of its GPUs" in said[-1]


def test_ranks_of_our_own_are_not_started_without_gpus_for_them(
    embedded_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig.from_options({"ep_size": 2})
    worlds_of(config, embedded_model)
    monkeypatch.setattr(suite, "device_of", lambda *names: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks on this machine, but 1 "):
        worlds_of(config, embedded_model)
