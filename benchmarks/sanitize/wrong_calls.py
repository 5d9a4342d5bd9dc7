"""Calls that reach one element past their memory, to show that the sanitizer sees it.

Run as a module, with the library and a name, in the environment of `build.environment`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from moe_serve.kernels.native import loader
from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.pointers import dtype_code

ROWS, OUT_FEATURES, IN_FEATURES = 3, 33, 65


def _linear(native: Native, short: str, dtype: torch.dtype) -> None:
    """Multiply, with one element missing from what `short` names."""
    code = dtype_code(dtype)
    sizes = {
        "weight": OUT_FEATURES * IN_FEATURES,
        "packed": native.function("packed_elements", "ill", "l")(code, OUT_FEATURES, IN_FEATURES),
        "rows": ROWS * IN_FEATURES,
        "bias": OUT_FEATURES,
        "out": ROWS * OUT_FEATURES,
    }
    tensors = {
        name: torch.zeros(size - (name == short), dtype=dtype) for name, size in sizes.items()
    }
    at = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    pack = native.function("pack_linear", "iipllp")
    pack(1, code, at["weight"], OUT_FEATURES, IN_FEATURES, at["packed"])
    native.function("linear", "iipllplpp")(
        1, code, at["rows"], ROWS, IN_FEATURES, at["packed"], OUT_FEATURES, at["bias"], at["out"]
    )


WRONG_CALLS = {
    f"{isa}, {dtype}, {short}": (isa, dtype, short)
    for isa, dtype, short in (
        ("plain", torch.bfloat16, "rows"),
        ("plain", torch.float32, "out"),
        ("avx512_bf16", torch.bfloat16, "weight"),
        ("avx512_bf16", torch.float32, "packed"),
        # the last vector of a row: masked
        ("avx512_bf16", torch.bfloat16, "rows"),
        ("avx512_bf16", torch.float32, "bias"),
        ("avx512_bf16", torch.bfloat16, "out"),
    )
}


def main() -> None:
    path, name = Path(sys.argv[1]), sys.argv[2]
    isa, dtype, short = WRONG_CALLS[name]
    if isa not in loader.supported_isas(loader.open_library(path)):
        isa = "plain"
    _linear(loader.load(isa, path), short, dtype)


if __name__ == "__main__":
    main()
