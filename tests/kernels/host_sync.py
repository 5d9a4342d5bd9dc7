"""Forbid what would make the host wait for a device, or ask it: such calls cannot be captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from moe_serve.kernels.gpu.waiting import NoWaiting


def _wait(tensor: Tensor, *args: object) -> None:
    raise AssertionError("this waits for the device")


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Fail on any call of torch's that a CUDA graph could not have in it."""
    with pytest.MonkeyPatch.context() as patch, NoWaiting():  # type: ignore[no-untyped-call]
        for name in ("tolist", "numpy", "cpu"):  # which torch does not dispatch on a CPU
            patch.setattr(Tensor, name, _wait)
        yield
