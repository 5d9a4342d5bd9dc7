"""What is mended of Triton's interpreter: each launch begins once, and leaves nothing behind."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from tests.kernels.implementations import INTERPRETED, kernels

if not INTERPRETED:
    pytest.skip("needs Triton, and no GPU", allow_module_level=True)

import triton.language as tl

from moe_serve.kernels.moe.triton import _silu_and_mul


def _language() -> dict[tuple[Any, str], object]:
    parts: tuple[ModuleType | type, ...] = (tl, tl.core, tl.math, tl.tensor, tl.dtype)
    return {(part, name): getattr(part, name) for part in parts for name in dir(part)}


def test_a_launch_leaves_the_language_as_it_was() -> None:
    before = _language()
    kernels("triton-exact").silu_and_mul(torch.ones(3, 8))
    assert _language() == before


def test_a_launch_that_fails_leaves_the_language_as_it_was() -> None:
    before = _language()
    with pytest.raises(TypeError):
        _silu_and_mul[(1,)](torch.ones(1))
    assert _language() == before
    kernels("triton-exact").silu_and_mul(torch.ones(3, 8))


def test_a_kernel_s_own_functions_find_the_language_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime import interpreter

    scopes = []
    set_attr = interpreter._LangPatchScope.set_attr

    def counted(self: object, obj: object, name: str, value: object) -> None:
        if obj is tl and name == "range":
            scopes.append(self)
        set_attr(self, obj, name, value)

    monkeypatch.setattr(interpreter._LangPatchScope, "set_attr", counted)
    kernels("triton-exact").silu_and_mul(torch.ones(1, 8))
    assert len(scopes) == 1, "not once for each function within"
