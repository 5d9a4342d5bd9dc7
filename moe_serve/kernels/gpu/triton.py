"""What all Triton kernels share: rounding, products, and whether they run on a GPU or are read.

Without a GPU Triton's interpreter runs them on CPU tensors: slow, and for tests. It takes bfloat16
products wrongly, and cuts off where a GPU rounds to the nearest (docs/log.md); hence `widened`,
`product` and `rounded`, which every kernel goes through.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

IS_INTERPRETED = not torch.cuda.is_available()
if IS_INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is made

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from moe_serve.kernels.gpu.numerics import Numerics  # noqa: E402


def _patch_once(interpreter) -> None:
    """Let a launch give Triton's language its interpreted functions once, not at each call within.

    The interpreter does so for every function that a kernel calls, which took longer than the calls
    themselves, and puts back only what the launch itself replaced.
    """
    patch = interpreter._patch_lang
    launch: list[Any] = []  # what the launch that runs, if one does, has replaced
    done: list[Any] = []  # in these modules

    @functools.cache
    def languages(function):
        tl, core = interpreter.tl, interpreter.tl.core
        return [m for m in function.__globals__.values() if m is tl or m is core]

    class Launch:
        def restore(self) -> None:
            done.clear()
            while launch:
                launch.pop().restore()

    def patch_once(function):
        is_launch, needed = not launch, languages(function)
        if is_launch or any(module not in done for module in needed):
            launch.append(patch(function))
            done.extend(needed)
        return Launch() if is_launch else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def _mend_interpreter() -> None:
    """Let Triton's interpreter run what its compiler runs, without beginning again at each call."""
    from triton.runtime import interpreter  # which a GPU does not need

    _patch_once(interpreter)
    # it computes with NumPy, which warns where a GPU says inf or NaN: of what is not used, too
    for says in ("overflow", "invalid value", "divide by zero"):
        warnings.filterwarnings("ignore", f"{says} encountered", RuntimeWarning)
    warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
    # Triton's own functions, too, where torch imported it before this module
    for module in [m for name, m in sys.modules.items() if name.startswith("triton.language")]:
        for name, function in list(vars(module).items()):
            if isinstance(function, triton.JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(function.fn))
    if not triton.__version__.startswith("3.6."):
        return
    # of its scalars, arrays of one element, NumPy 2.4 makes no bounds of a loop
    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_with_index


if IS_INTERPRETED:
    _mend_interpreter()

_READ: tl.constexpr = tl.constexpr(IS_INTERPRETED)
_MOST_TERMS: tl.constexpr = tl.constexpr(2**20)  # Triton's limit of a tensor's elements


def device() -> torch.device:
    """Return where these kernels' tensors are: the present GPU, or the CPU, interpreted."""
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


def is_building_launchers() -> bool:
    """Whether a kernel's launcher is built in C when it runs for the first time, by Triton itself.

    It may have been given another way to build them.
    """
    return not IS_INTERPRETED and triton.knobs.build.impl is None


def numerics_id(numerics: Numerics) -> str:
    """Name what decides bits: the compiler, the card's generation, and how tiles are chosen."""
    where = "interpreted"
    if not IS_INTERPRETED:
        major, minor = torch.cuda.get_device_capability()
        where = f"sm{major}{minor}"
    return f"triton{triton.__version__}-{where}-{numerics}"


def aligned(tensor: Tensor) -> Tensor:
    """Return the same numbers, contiguous, from an address that is a multiple of 16.

    A compiler loads, and so adds up, in another order where the address is not one.
    """
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@triton.jit
def ordered(values):
    """Return int32 in the order of float32 values: -0 is 0, and a NaN is above all.

    No result is -2**31.
    """
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def rounded(wide, dtype: tl.constexpr):
    """Round float32 to the nearest `dtype`, ties to even."""
    if _READ and dtype == tl.bfloat16:
        bits = wide.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(wide == wide, nearest, 0x7FC0)
        return nearest.to(tl.int16).to(dtype, bitcast=True)
    return wide.to(dtype)


@triton.jit
def widened(values):
    """Return bfloat16, float16 or float32 values as float32."""
    if _READ and values.dtype == tl.bfloat16:
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def product(rows, columns, total):
    """Add rows [m, k] times columns [k, n], of one dtype, to float32 total [m, n]."""
    if not _READ:
        total = tl.dot(rows, columns, total, input_precision="ieee")
    # the library behind an interpreted tl.dot adds in an order that depends on a row's place in the
    # tile: added by hand, or in float64, which holds such sums of shorter numbers
    elif rows.dtype == tl.float32 and rows.numel * columns.shape[1] <= _MOST_TERMS:
        total += tl.sum(rows[:, :, None] * columns[None, :, :], 1)
    else:
        wide = tl.dot(rows.to(tl.float64), columns.to(tl.float64), out_dtype=tl.float64)
        total += wide.to(tl.float32)
    return total
