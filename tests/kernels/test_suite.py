"""Which kernels are taken where there is a GPU, and what is said where an option has no effect."""

from __future__ import annotations

import logging
import sysconfig
from pathlib import Path

import pytest
import torch

from moe_serve.errors import ConfigError
from moe_serve.kernels import suite
from moe_serve.kernels.gpu.compiler import why_no_launchers

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


@pytest.fixture
def compiled(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that is all of PATH, on a machine whose kernels would be compiled."""
    from moe_serve.kernels.gpu import triton  # which a machine may not have

    monkeypatch.setattr(triton, "IS_INTERPRETED", False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def _program(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def test_a_gpu_without_a_compiler_is_not_used_and_that_is_said(
    compiled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    why = "Triton cannot build what launches its kernels: there is no C compiler; install gcc or"
    with caplog.at_level(logging.WARNING):
        kernels = suite.load()
    assert kernels.name != "triton"
    assert f"the GPU is not used: {why}" in caplog.text
    assert f"the GPU is not used: {why}" in kernels.reason  # which `doctor` shows
    assert suite.device_of("auto") == kernels.device == torch.device("cpu")
    for asked in (suite.load, suite.device_of):
        with pytest.raises(ConfigError, match=why):
            asked("triton")


def test_a_compiler_is_looked_for_as_triton_does(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gcc", "clang"):
        _program(compiled / name)
        lack = why_no_launchers()
        assert lack is not None
        assert "Python.h; install Python's headers" in lack
        (compiled / name).unlink()
    (compiled / "Python.h").touch()
    assert "there is no C compiler" in str(why_no_launchers())
    _program(compiled / "mine")
    monkeypatch.setenv("CC", "mine")
    assert why_no_launchers() is None
    _program(compiled / "gcc")
    monkeypatch.setenv("CC", "another")  # it is not passed over for another one
    assert "CC is 'another', which is no program" in str(why_no_launchers())
    monkeypatch.delenv("CC")
    assert why_no_launchers() is None
    assert suite.device_of("auto").type == "cuda"


def test_launchers_may_be_built_elsewhere(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton  # which a machine may not have

    monkeypatch.setattr(triton.knobs.build, "impl", lambda *args: "launcher.so")
    assert suite.device_of("auto").type == "cuda"


def test_fast_numerics_are_of_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        suite.load("reference", numerics="fast")
    assert "numerics=fast has no effect" in caplog.text
    with pytest.raises(ConfigError, match=r"numerics is 'quick'; there are: exact, fast"):
        suite.load(numerics="quick")
