"""Which kernels are taken where there is a GPU, and what is said where an option has no effect."""

from __future__ import annotations

import logging

import pytest
import torch

from moe_serve.errors import ConfigError
from moe_serve.kernels import suite

CARD = "a card of 1 TB/s"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    suite.load("triton")  # which finds out, once, that there is none
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)


def test_a_gpu_that_is_there_is_taken(gpu: None) -> None:
    kernels = suite.load()
    assert kernels.name == "triton"
    assert CARD in kernels.reason
    assert suite.device_of("auto") == kernels.device


@pytest.mark.parametrize(("name", "isa"), [("reference", "auto"), ("auto", "plain")])
def test_what_is_asked_for_is_taken_all_the_same(name: str, isa: str, gpu: None) -> None:
    try:
        kernels = suite.load(name, isa)
    except ConfigError:
        pytest.skip("the native library is not built")
    assert kernels.name != "triton"
    assert suite.device_of(name, isa) == kernels.device == torch.device("cpu")


def test_a_gpu_without_triton_is_said(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise ConfigError("Triton is not installed")

    monkeypatch.setattr(suite, "_gpu", missing)
    with caplog.at_level(logging.WARNING):
        kernels = suite.load()
    assert kernels.name != "triton"
    assert "the GPU is not used: Triton is not installed" in caplog.text
    assert suite.device_of("auto").type == "cpu"


def test_fast_numerics_are_of_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        suite.load("reference", numerics="fast")
    assert "numerics=fast has no effect" in caplog.text
    with pytest.raises(ConfigError, match=r"numerics is 'quick'; there are: exact, fast"):
        suite.load(numerics="quick")
