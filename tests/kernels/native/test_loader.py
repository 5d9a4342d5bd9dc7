"""A library that cannot be used is told apart from one that can, before it ends the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_serve.errors import ConfigError
from moe_serve.kernels import suite
from moe_serve.kernels.native import loader


@pytest.fixture
def built() -> Path:
    path = loader.built_path()
    if path is None:
        pytest.skip("the native library is not built")
    return path


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.7, 0.99])
def test_a_file_that_is_cut_off_is_not_loaded(tmp_path: Path, built: Path, share: float) -> None:
    whole = built.read_bytes()
    cut = tmp_path / "cut.so"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(loader.NotBuilt, match=r"cut\.so"):
        loader.open_library(cut)


def test_another_library_is_not_taken_for_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: Path
) -> None:
    # of our version, but without functions: as if it had been built from other sources
    renamed = built.read_bytes().replace(b"ms_has_avx512_bf16", b"ms_hat_avx512_bf16")
    other = tmp_path / "other.so"
    other.write_bytes(renamed)
    monkeypatch.setattr(loader, "built_path", lambda: other)
    monkeypatch.setattr(loader, "_is_stale", lambda path: False)
    loader.open_library.cache_clear()
    try:
        assert suite.load().name == "reference"
        with pytest.raises(ConfigError, match="kernels is 'cpu', but the native library"):
            suite.load("cpu")
    finally:
        loader.open_library.cache_clear()


def test_a_library_older_than_its_sources_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: Path
) -> None:
    old = tmp_path / "old.so"
    old.write_bytes(built.read_bytes())
    os.utime(old, (0, 0))
    monkeypatch.setattr(loader, "built_path", lambda: old)
    loader.open_library.cache_clear()
    try:
        with pytest.raises(loader.NotBuilt, match=r"old\.so is older than its sources"):
            loader.load()
    finally:
        loader.open_library.cache_clear()


def test_plain_kernels_serve_only_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, built: Path
) -> None:
    monkeypatch.setattr(loader, "supported_isas", lambda opened: ("plain",))
    assert suite.load().name == "reference"
    assert "faster than plain C++" in suite.load().reason
    assert suite.load("cpu").isa == "plain"
    assert suite.load(isa="plain").isa == "plain"
