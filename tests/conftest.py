"""What all tests share: where data lies, what a machine must have, memory that shows misuse."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_serve.openmp import wait_shortly

wait_shortly()  # before torch is loaded, as where moe_serve is used

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when transformers loads it

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs more CUDA devices than there are."""
    num_devices = torch.cuda.device_count()
    for item in items:
        needed = 1 if item.get_closest_marker("gpu") else 0
        if (multigpu := item.get_closest_marker("multigpu")) is not None:
            needed = int(multigpu.args[0])
        if needed > num_devices:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {needed} CUDA devices; here: {num_devices}")
            )


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of models, prompts and traces beside the checkout; CI must have it."""
    path = Path(os.environ.get("TEST_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        reason = "no ../shared/data beside the checkout, and TEST_SHARED_DATA names no folder"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path.resolve()


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The checkpoint that the package ships."""
    return ROOT / "moe_serve" / "assets" / "demo-moe"


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """Give the next test the number of threads and the default dtype that this one found."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make uninitialised floating-point tensors NaN, so that reading one before writing shows."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
