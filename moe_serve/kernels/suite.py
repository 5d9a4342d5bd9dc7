"""Which implementation of each kernel runs: chosen once, at start, and named in `numerics_id`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_serve.errors import ConfigError
from moe_serve.kernels.combine import reference as combine_reference
from moe_serve.kernels.linear import reference as linear_reference
from moe_serve.kernels.moe import reference as moe_reference
from moe_serve.kernels.paged_attention import reference as attention_reference
from moe_serve.kernels.rms_norm import reference as norm_reference
from moe_serve.kernels.rope import reference as rope_reference
from moe_serve.kernels.router import reference as router_reference
from moe_serve.kernels.sampling import reference as sampling_reference
from moe_serve.types import Routing


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every kernel of the forward pass.

    numerics_id names implementation and instruction set: two engines with the same id, model and
    dtype give the same bits.
    """

    name: str
    numerics_id: str
    pack: Callable[[Tensor], Tensor]
    linear: Callable[..., Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope_write_kv: Callable[..., Tensor]
    plan_attention: Callable[..., Any]
    paged_attention: Callable[..., Tensor]
    route: Callable[..., Routing]
    moe: Callable[..., Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    combine: Callable[..., Tensor]
    sampling: ModuleType


def load(name: str) -> Kernels:
    """Return the kernels of an implementation: "reference", or "auto", the best there is."""
    if name not in ("auto", "reference"):
        raise ConfigError(f"kernels is {name!r}; there are: auto, reference")
    return Kernels(
        name="reference",
        numerics_id=f"reference-torch{torch.__version__.split('+')[0]}-{_cpu_capability()}",
        pack=linear_reference.pack,
        linear=linear_reference.linear,
        rms_norm=norm_reference.rms_norm,
        add_rms_norm=norm_reference.add_rms_norm,
        rope_write_kv=rope_reference.rope_write_kv,
        plan_attention=attention_reference.plan,
        paged_attention=attention_reference.paged_attention,
        route=router_reference.route,
        moe=moe_reference.moe,
        silu_and_mul=moe_reference.silu_and_mul,
        combine=combine_reference.combine,
        sampling=sampling_reference,
    )


def _cpu_capability() -> str:
    capability = str(torch.backends.cpu.get_cpu_capability()).lower()
    # torch names the vector width only; whether bfloat16 products run in hardware changes bits too
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return f"{capability}-bf16" if has_bf16 is not None and has_bf16() else capability
