"""A whole forward pass as one call of the native library.

It runs the functions that the kernels run one by one, in the order of models/decoder.py, in one
parallel region: the same bits, without Python between them. What a layer is comes as the layers'
own objects; nothing here decides anything.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_serve.kernels.forward.base import LayerPart, LinearPart, ModelPart
from moe_serve.kernels.linear.cpu import PackedWeight
from moe_serve.kernels.moe.cpu import ExpertTableArguments
from moe_serve.kernels.native.library import DTYPE_CODES, Native
from moe_serve.kernels.paged_attention.cpu import AttentionPlan, Plan
from moe_serve.kernels.rope.cpu import HeadsArguments
from moe_serve.kernels.router.cpu import RouterArguments

# what the work space of a step is rounded up to, so that it is seldom allocated anew
_WORKSPACE_STEP = 2**22


class _Linear(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("qkv", _Linear),
        ("output", _Linear),
        ("heads", HeadsArguments),
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("group", ctypes.c_int32),
        ("is_moe", ctypes.c_int32),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("router_weights", _Linear),
        ("router", RouterArguments),
        ("experts", ExpertTableArguments),
        ("shared_gate", ctypes.c_void_p),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("num_layers", ctypes.c_int64),
        ("layers", ctypes.POINTER(_Layer)),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("hidden_size", ctypes.c_int64),
        ("norm_eps", ctypes.c_float),
        ("is_embedding_packed", ctypes.c_int32),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.POINTER(ctypes.c_void_p)),
        ("plans", ctypes.POINTER(AttentionPlan)),
    )


class Forward:
    """One model's forward pass; keeps what the native side points to."""

    def __init__(self, native: Native, model: ModelPart) -> None:
        self._forward = native.function("forward", "iipppp")
        self._bytes = native.function("forward_bytes", "ipp", "l")
        sizes = native.machine_function("sizes", "i", "l")
        for index, kind in enumerate((_Layer, _Model, _Step, AttentionPlan)):
            assert sizes(index) == ctypes.sizeof(kind), f"{kind.__name__} is not arguments.h's"
        self._kept = model
        self._dtype = model.norm.dtype
        self._hidden_size = model.norm.shape[0]
        layers = (_Layer * len(model.layers))(*(_layer(part) for part in model.layers))
        is_packed = isinstance(model.embedding, PackedWeight)
        table = (
            model.embedding.data if isinstance(model.embedding, PackedWeight) else model.embedding
        )
        self._model = _Model(
            len(layers),
            layers,
            table.data_ptr(),
            model.norm.data_ptr(),
            self._hidden_size,
            model.norm_eps,
            is_packed,
        )
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Sequence[Tensor],
        plans: Sequence[Plan],
    ) -> Tensor:
        """Return the residual stream after the last norm, [num_tokens, hidden_size].

        token_ids, positions: int64 [num_tokens]; slots, plans: one for each cache group. Writes
        this step's keys and values into the caches.
        """
        num_tokens = token_ids.shape[0]
        step = _Step(
            num_tokens,
            token_ids.data_ptr(),
            positions.data_ptr(),
            (ctypes.c_void_p * len(slots))(*(part.data_ptr() for part in slots)),
            (AttentionPlan * len(plans))(*(plan.arguments for plan in plans)),
        )
        code = DTYPE_CODES[self._dtype]
        model, at = ctypes.addressof(self._model), ctypes.addressof(step)
        needed = self._bytes(code, model, at)
        if needed > self._workspace.shape[0]:
            self._workspace = torch.empty(0, dtype=torch.uint8)  # first give back what there was
            rounded = -(-needed // _WORKSPACE_STEP) * _WORKSPACE_STEP
            self._workspace = torch.empty(rounded, dtype=torch.uint8)
        out = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype)
        self._forward(
            torch.get_num_threads(), code, model, at, self._workspace.data_ptr(), out.data_ptr()
        )
        return out


def builder(native: Native) -> Callable[[ModelPart], Forward]:
    """Return what makes a `Forward` of a model."""
    return lambda model: Forward(native, model)


def _linear(part: LinearPart | None) -> _Linear:
    if part is None:
        return _Linear()
    bias = None if part.bias is None else part.bias.data_ptr()
    weight = part.weight
    return _Linear(weight.data.data_ptr(), bias, weight.out_features, weight.in_features)


def _layer(part: LayerPart) -> _Layer:
    values: dict[str, Any] = {
        "attention_norm": part.attention_norm.data_ptr(),
        "mlp_norm": part.mlp_norm.data_ptr(),
        "qkv": _linear(part.qkv),
        "output": _linear(part.output),
        "heads": HeadsArguments.of(part.heads),
        "key_cache": part.key_cache.data_ptr(),
        "value_cache": part.value_cache.data_ptr(),
        "num_slots": part.key_cache.shape[1],
        "scale": part.scale,
        "group": part.group,
        "gate_up": _linear(part.gate_up),
        "down": _linear(part.down),
    }
    if part.moe is not None:
        values |= {
            "is_moe": 1,
            "router_weights": _linear(part.moe.router),
            "router": RouterArguments.of(part.moe.recipe, part.moe.selection_bias),
            "experts": ExpertTableArguments.of(part.moe.experts),
        }
        if part.moe.shared_gate is not None:
            values["shared_gate"] = part.moe.shared_gate.data_ptr()
    return _Layer(**values)
