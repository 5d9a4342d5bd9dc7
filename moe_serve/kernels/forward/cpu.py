"""A whole forward pass as one call of the native library.

It runs the functions that the kernels run one by one, in the order of models/decoder.py, in one
parallel region: the same bits, without Python between them. What a layer is comes as the layers'
own objects; nothing here decides anything.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_serve.kernels.forward.base import LayerPart, LinearPart, ModelPart, Stopped, Watcher
from moe_serve.kernels.linear.cpu import PackedWeight
from moe_serve.kernels.moe.cpu import ExpertTableArguments
from moe_serve.kernels.native.loader import Native, NotBuilt
from moe_serve.kernels.native.pointers import dtype_code, empty, pointer, pointer_or_null
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


class _Progress(ctypes.Structure):
    _fields_ = (
        ("layer", ctypes.c_int64),
        ("is_routed", ctypes.c_int32),
        ("stops", ctypes.c_int32),
        ("is_last", ctypes.c_int32),
        ("is_forced", ctypes.c_int32),
        ("only", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("arrivals", ctypes.c_void_p),
    )


class Forward:
    """One model's forward pass; keeps what the native side points to."""

    def __init__(self, native: Native, model: ModelPart) -> None:
        self._forward = native.function("forward", "iippppp")
        self._places = native.function("forward_places", "ipppp")
        self._bytes = native.function("forward_bytes", "ipp", "l")
        sizes = native.machine_function("sizes", "i", "l")
        for index, kind in enumerate((_Layer, _Model, _Step, AttentionPlan, _Progress)):
            if sizes(index) != ctypes.sizeof(kind):
                raise NotBuilt(f"{kind.__name__} is not the library's; install again")
        self._kept = model
        self._dtype = model.norm.dtype
        self._hidden_size = model.norm.shape[0]
        layers = (_Layer * len(model.layers))(*(_layer(part, self._dtype) for part in model.layers))
        is_packed = isinstance(model.embedding, PackedWeight)
        table = (
            model.embedding.data if isinstance(model.embedding, PackedWeight) else model.embedding
        )
        self._model = _Model(
            len(layers),
            layers,
            pointer(table, self._dtype),
            pointer(model.norm, self._dtype),
            self._hidden_size,
            model.norm_eps,
            is_packed,
        )
        self._code = dtype_code(self._dtype)
        self._workspace = empty(0, dtype=torch.uint8)

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Sequence[Tensor],
        plans: Sequence[Plan],
        watcher: Watcher | None = None,
    ) -> Tensor:
        """Return the residual stream after the last norm, [num_tokens, hidden_size].

        token_ids, positions: int64 [num_tokens]; slots, plans: one for each cache group. Writes
        this step's keys and values into the caches. watcher: whom to ask about missing experts.
        """
        num_tokens = token_ids.shape[0]
        step = _Step(
            num_tokens,
            pointer(token_ids, torch.int64),
            pointer(positions, torch.int64),
            (ctypes.c_void_p * len(slots))(*(pointer(part, torch.int64) for part in slots)),
            (AttentionPlan * len(plans))(*(plan.arguments for plan in plans)),
        )
        model, at = ctypes.addressof(self._model), ctypes.addressof(step)
        needed = self._bytes(self._code, model, at)
        if needed > self._workspace.shape[0]:
            self._workspace = empty(0, dtype=torch.uint8)  # first give back what there was
            rounded = -(-needed // _WORKSPACE_STEP) * _WORKSPACE_STEP
            self._workspace = empty(rounded, dtype=torch.uint8)
        out = empty(num_tokens, self._hidden_size, dtype=self._dtype)
        progress = _Progress()
        if watcher is not None:
            progress.stops = int(watcher.stops)
            progress.is_forced = watcher.is_forced
            progress.ids = pointer_or_null(watcher.ids, torch.int64)
            progress.weights = pointer_or_null(watcher.weights, torch.float32)

        def go_on() -> None:
            self._forward(
                torch.get_num_threads(),
                self._code,
                model,
                at,
                self._workspace.data_ptr(),
                ctypes.addressof(progress),
                pointer(out, self._dtype),
            )

        go_on()
        if watcher is not None and progress.layer < len(self._kept.layers):
            self._serve(watcher, progress, model, at, num_tokens, go_on)
        return out

    def _serve(
        self,
        watcher: Watcher,
        progress: _Progress,
        model: int,
        step: int,
        num_tokens: int,
        go_on: Callable[[], None],
    ) -> None:
        """Ask the watcher wherever the pass stopped, until it has come to its end."""
        places = (ctypes.c_int64 * 4)()
        memory = self._workspace
        self._places(self._code, model, step, memory.data_ptr(), ctypes.addressof(places))

        def view(place: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return memory[place : place + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

        residual = view(places[0], self._dtype, num_tokens, self._hidden_size)
        shapes: dict[tuple[int, int], tuple[Any, ...]] = {}
        while (layer := progress.layer) < len(self._kept.layers):
            moe = self._kept.layers[layer].moe
            assert moe is not None
            key = (moe.recipe.top_k, moe.recipe.num_experts)
            if key not in shapes:  # mostly the same for all layers
                shapes[key] = (
                    view(places[2], torch.int64, num_tokens, key[0]).numpy(),
                    view(places[1], torch.float32, num_tokens, key[0]).numpy(),
                    view(places[3], torch.int64, key[1]).numpy(),
                )
            ids, weights, counts = shapes[key]
            stopped = Stopped(
                layer=layer, expert_ids=ids, weights=weights, counts=counts, residual=residual
            )
            for run in watcher.serve(stopped):
                progress.only = pointer_or_null(run.only, torch.uint8)
                progress.arrivals = None if run.arrivals is None else run.arrivals.address
                progress.is_last = run.is_last
                go_on()
            assert progress.layer > layer, "the experts of a layer were not all served"


def builder(native: Native) -> Callable[[ModelPart], Forward]:
    """Return what makes a `Forward` of a model."""
    return lambda model: Forward(native, model)


def _linear(part: LinearPart | None, dtype: torch.dtype) -> _Linear:
    if part is None:
        return _Linear()
    weight = part.weight
    return _Linear(
        pointer(weight.data, dtype),
        pointer_or_null(part.bias, dtype),
        weight.out_features,
        weight.in_features,
    )


def _layer(part: LayerPart, dtype: torch.dtype) -> _Layer:
    values: dict[str, Any] = {
        "attention_norm": pointer(part.attention_norm, dtype),
        "mlp_norm": pointer(part.mlp_norm, dtype),
        "qkv": _linear(part.qkv, dtype),
        "output": _linear(part.output, dtype),
        "heads": HeadsArguments.of(part.heads, dtype),
        "key_cache": pointer(part.key_cache, dtype),
        "value_cache": pointer(part.value_cache, dtype),
        "num_slots": part.key_cache.shape[1],
        "scale": part.scale,
        "group": part.group,
        "gate_up": _linear(part.gate_up, dtype),
        "down": _linear(part.down, dtype),
    }
    if part.moe is not None:
        values |= {
            "is_moe": 1,
            "router_weights": _linear(part.moe.router, torch.float32),
            "router": RouterArguments.of(part.moe.recipe, part.moe.selection_bias),
            "experts": ExpertTableArguments.of(part.moe.experts),
        }
        if part.moe.shared_gate is not None:
            values["shared_gate"] = pointer(part.moe.shared_gate, torch.float32)
    return _Layer(**values)
