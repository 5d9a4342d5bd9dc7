"""Which implementation of each kernel runs: chosen once, at start, and named in `numerics_id`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_serve.errors import ConfigError
from moe_serve.kernels.combine import cpu as combine_cpu
from moe_serve.kernels.combine import reference as combine_reference
from moe_serve.kernels.exchange import cpu as exchange_cpu
from moe_serve.kernels.exchange import reference as exchange_reference
from moe_serve.kernels.exchange.base import Packed, Unpacked
from moe_serve.kernels.forward import cpu as forward_cpu
from moe_serve.kernels.forward import gpu as forward_gpu
from moe_serve.kernels.forward.base import Forward, ModelPart
from moe_serve.kernels.gpu.compiler import why_no_launchers
from moe_serve.kernels.gpu.numerics import NUMERICS, Numerics
from moe_serve.kernels.linear import cpu as linear_cpu
from moe_serve.kernels.linear import reference as linear_reference
from moe_serve.kernels.moe import cpu as moe_cpu
from moe_serve.kernels.moe import reference as moe_reference
from moe_serve.kernels.native import loader
from moe_serve.kernels.paged_attention import cpu as attention_cpu
from moe_serve.kernels.paged_attention import reference as attention_reference
from moe_serve.kernels.rms_norm import cpu as norm_cpu
from moe_serve.kernels.rms_norm import reference as norm_reference
from moe_serve.kernels.rope import cpu as rope_cpu
from moe_serve.kernels.rope import reference as rope_reference
from moe_serve.kernels.router import cpu as router_cpu
from moe_serve.kernels.router import reference as router_reference
from moe_serve.kernels.sampling import cpu as sampling_cpu
from moe_serve.kernels.sampling import reference as sampling_reference
from moe_serve.kernels.sampling.base import Sampling
from moe_serve.types import Routing

logger = logging.getLogger(__name__)

KERNELS = ("auto", "cpu", "reference", "triton")


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every kernel of the forward pass.

    name: "cpu", "reference" or "triton"; device: where all tensors are that they are given; isa:
    the native kernels' instruction set; reason: why these were
    chosen. numerics_id names implementation and instruction set: two engines with the same id,
    model and dtype give the same bits. build_forward makes the whole forward pass one call, of the
    same bits; None where there is no such thing.
    """

    name: str
    isa: str | None
    reason: str
    numerics_id: str
    device: torch.device
    pack: Callable[[Tensor], Any]
    linear: Callable[..., Tensor]
    gather: Callable[[Any, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope_write_kv: Callable[..., Tensor]
    plan_attention: Callable[..., Any]
    paged_attention: Callable[..., Tensor]
    route: Callable[..., Routing]
    sort_pairs: Callable[..., tuple[Tensor, Tensor, Tensor]]
    shared_weights: Callable[[Tensor, Tensor], Tensor]
    record_layout: int
    record_bytes: Callable[[int, int, torch.dtype], int]
    pack_records_: Callable[[Tensor, int, int, torch.dtype], None]
    moe: Callable[..., Tensor]
    silu_and_mul: Callable[[Tensor], Tensor]
    combine: Callable[..., Tensor]
    pack_rows: Callable[..., Packed]
    unpack_rows: Callable[..., Unpacked]
    scatter_rows: Callable[[Tensor, Tensor, Tensor], None]
    sampling: Sampling
    build_forward: Callable[[ModelPart], Forward] | None = None


def load(name: str = "auto", isa: str = "auto", numerics: str = "exact") -> Kernels:
    """Return an implementation's kernels: "cpu", "reference", "triton", or "auto", the best here.

    isa: the native kernels' instruction set, or "auto". numerics: whether those of a GPU may choose
    their tiles by the number of rows. The best is a GPU's, where there is one. "triton" without a
    GPU is interpreted: for tests. Plain C++ is 5 to 30 times slower than torch with AVX2
    (docs/log.md), so it serves only where it is asked for. Raises ConfigError for what is not to be
    had here.
    """
    if name not in KERNELS:
        raise ConfigError(f"kernels is {name!r}; there are: {', '.join(KERNELS)}")
    if numerics not in NUMERICS:
        raise ConfigError(f"numerics is {numerics!r}; there are: {', '.join(NUMERICS)}")
    if name == "triton":
        if isa != "auto":
            raise ConfigError(f"isa is {isa!r}, but the Triton kernels have none; leave it out")
        return _triton(numerics, "asked for")
    if _may_take_gpu(name, isa):
        try:
            return _triton(numerics, f"a GPU is here: {torch.cuda.get_device_name()}")
        except ConfigError as error:
            unused = f"the GPU is not used: {error}"
            logger.warning("%s", unused)
            kernels = _on_host(name, isa, numerics)
            return replace(kernels, reason=f"{kernels.reason}; {unused}")
    return _on_host(name, isa, numerics)


def _on_host(name: str, isa: str, numerics: Numerics) -> Kernels:
    if numerics == "fast":
        logger.warning("numerics=fast has no effect: on a CPU all is exact")
    if name == "reference":
        if isa != "auto":
            raise ConfigError(f"isa is {isa!r}, but the reference kernels have none; leave it out")
        return _reference("asked for")
    try:
        native = loader.load(isa)
        if name == "auto" and isa == "auto" and native.isa == "plain":
            reason = "faster than plain C++, which is all the library has for this processor"
            logger.warning("kernels: reference (plain torch): %s", reason)
            return _reference(reason)
        return _cpu(native, "the best here" if isa == "auto" else "asked for")
    except loader.NotBuilt as error:
        if isa != "auto":
            raise ConfigError(f"isa is {isa!r}, but {error}") from error
        if name == "cpu":
            raise ConfigError(f"kernels is 'cpu', but {error}") from error
        logger.warning("slow kernels (reference, plain torch): %s", error)
        return _reference(str(error))


def _cpu(native: loader.Native, reason: str) -> Kernels:
    linear, norm = linear_cpu.LinearKernels(native), norm_cpu.NormKernels(native)
    router, moe = router_cpu.RouterKernels(native), moe_cpu.MoeKernels(native)
    exchange = exchange_cpu.ExchangeKernels(native)
    return Kernels(
        name="cpu",
        isa=native.isa,
        reason=reason,
        numerics_id=f"cpu{loader.ABI}-{native.isa}",
        device=torch.device("cpu"),
        pack=linear.pack,
        linear=linear.linear,
        gather=linear.gather,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        rope_write_kv=rope_cpu.RopeKernels(native).rope_write_kv,
        plan_attention=attention_cpu.plan,
        paged_attention=attention_cpu.build(native),
        route=router.route,
        sort_pairs=router.sort_pairs,
        shared_weights=router.shared_weights,
        record_layout=moe_cpu.RECORD_LAYOUT,
        record_bytes=moe.record_bytes,
        pack_records_=moe.pack_records_,
        moe=moe.moe,
        silu_and_mul=moe.silu_and_mul,
        combine=combine_cpu.build(native),
        pack_rows=exchange.pack_rows,
        unpack_rows=exchange.unpack_rows,
        scatter_rows=exchange.scatter_rows,
        sampling=sampling_cpu.SamplingKernels(native),
        build_forward=forward_cpu.builder(native),
    )


def _reference(reason: str) -> Kernels:
    return Kernels(
        name="reference",
        isa=None,
        reason=reason,
        numerics_id=f"reference-torch{torch.__version__.split('+')[0]}-{_torch_capability()}",
        device=torch.device("cpu"),
        pack=linear_reference.pack,
        linear=linear_reference.linear,
        gather=linear_reference.gather,
        rms_norm=norm_reference.rms_norm,
        add_rms_norm=norm_reference.add_rms_norm,
        rope_write_kv=rope_reference.rope_write_kv,
        plan_attention=attention_reference.plan,
        paged_attention=attention_reference.paged_attention,
        route=router_reference.route,
        sort_pairs=router_reference.sort_pairs,
        shared_weights=router_reference.shared_weights,
        record_layout=moe_reference.RECORD_LAYOUT,
        record_bytes=moe_reference.record_bytes,
        pack_records_=moe_reference.pack_records_,
        moe=moe_reference.moe,
        silu_and_mul=moe_reference.silu_and_mul,
        combine=combine_reference.combine,
        pack_rows=exchange_reference.pack_rows,
        unpack_rows=exchange_reference.unpack_rows,
        scatter_rows=exchange_reference.scatter_rows,
        sampling=sampling_reference,
    )


def device_of(name: str, isa: str = "auto") -> torch.device:
    """Return where the tensors of `load(name, isa)`'s kernels are, without loading the others.

    Raises ConfigError as it does.
    """
    if name == "triton":
        return _device_of_gpu()
    if _may_take_gpu(name, isa):
        try:
            return _device_of_gpu()
        except ConfigError:
            pass
    return torch.device("cpu")


def _may_take_gpu(name: str, isa: str) -> bool:
    return name == "auto" and isa == "auto" and torch.cuda.is_available()


def _device_of_gpu() -> torch.device:
    device: torch.device = _gpu().device()
    return device


def _gpu() -> ModuleType:
    """Return what all Triton kernels share."""
    try:
        from moe_serve.kernels.gpu import triton
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ConfigError(
            "kernels is 'triton', but Triton is not installed (pip install triton)"
        ) from error
    if triton.is_building_launchers() and (lack := why_no_launchers()) is not None:
        raise ConfigError(f"Triton cannot build what launches its kernels: {lack}")
    return triton


def _triton(numerics: Numerics, reason: str) -> Kernels:
    gpu = _gpu()
    from moe_serve.kernels.combine import triton as combine_triton
    from moe_serve.kernels.exchange import triton as exchange_triton
    from moe_serve.kernels.linear import triton as linear_triton
    from moe_serve.kernels.moe import triton as moe_triton
    from moe_serve.kernels.paged_attention import triton as attention_triton
    from moe_serve.kernels.rms_norm import triton as norm_triton
    from moe_serve.kernels.rope import triton as rope_triton
    from moe_serve.kernels.router import triton as router_triton
    from moe_serve.kernels.sampling import triton as sampling_triton

    linear, moe = linear_triton.LinearKernels(numerics), moe_triton.MoeKernels(numerics)
    if gpu.IS_INTERPRETED:
        logger.warning("kernels: triton without a GPU is interpreted: very slow, for tests")
    kernels = replace(
        _reference(reason),
        name="triton",
        numerics_id=gpu.numerics_id(numerics),
        device=gpu.device(),
        pack=linear.pack,
        linear=linear.linear,
        gather=linear.gather,
        record_layout=moe_triton.RECORD_LAYOUT,
        record_bytes=moe.record_bytes,
        pack_records_=moe.pack_records_,
        moe=moe.moe,
        silu_and_mul=moe.silu_and_mul,
        plan_attention=attention_triton.plan,
        paged_attention=attention_triton.build(numerics),
        rms_norm=norm_triton.rms_norm,
        add_rms_norm=norm_triton.add_rms_norm,
        rope_write_kv=rope_triton.rope_write_kv,
        route=router_triton.route,
        sort_pairs=router_triton.sort_pairs,
        shared_weights=router_triton.shared_weights,
        combine=combine_triton.combine,
        pack_rows=exchange_triton.pack_rows,
        unpack_rows=exchange_triton.unpack_rows,
        scatter_rows=exchange_triton.scatter_rows,
        sampling=sampling_triton,
    )
    return replace(kernels, build_forward=forward_gpu.builder(kernels))


def _torch_capability() -> str:
    capability = str(torch.backends.cpu.get_cpu_capability()).lower()
    # torch names the vector width only; whether bfloat16 products run in hardware changes bits too
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return f"{capability}-bf16" if has_bf16 is not None and has_bf16() else capability
