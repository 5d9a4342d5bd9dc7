"""Where experts are kept: all in memory, or some of them, settled before anything is made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_serve.config import EngineConfig, ExpertsConfig, changed
from moe_serve.engine.division import Demand, divided
from moe_serve.engine.memory import (
    GIB,
    kv_room_bytes,
    num_kv_blocks,
    sequence_bytes,
    table_bytes,
    text_of,
)
from moe_serve.engine.ranks import Share
from moe_serve.errors import CapacityError, ConfigError
from moe_serve.experts.cache import check_capacity
from moe_serve.experts.policies.base import CacheShape
from moe_serve.experts.read_ahead import default_places, most_places
from moe_serve.experts.records import RECORD_ALIGNMENT
from moe_serve.kernels.suite import Kernels
from moe_serve.models.checkpoint import weights_bytes
from moe_serve.models.expert_weights import moe_layers, names_without_experts
from moe_serve.models.spec import ModelSpec, MoeSpec

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

_OF_A_CACHE = (
    "expert_cache_scope",
    "expert_stream_slots",
    "eviction",
    "prefetch",
    "predictor",
    "predictor_state",
    "miss",
    "expert_store",
)
# of what experts could get by `auto`: the rest is for work space and the transfers' own
_SHARE_OF_FREE = 0.9


@dataclass(frozen=True, slots=True)
class Residency:
    """How many experts are held. shape: None where all are, or where there are none.

    slot_bytes: of one expert; model_bytes: what all weights take in memory, experts among them.
    kv_bytes: what keys and values get beside them, where that was settled here. stream_slots: how
    many experts can be on a GPU besides, on their way to a slot.
    """

    shape: CacheShape | None
    slot_bytes: int
    model_bytes: int
    top_k: int
    kv_bytes: int | None = None
    stream_slots: int = 0


def plan_residency(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    kernels: Kernels,
    max_model_len: int,
    available: int,
    uses: Array | None = None,
    share: Share | None = None,
) -> Residency:
    """Settle how many experts of each layer are held, by the options or by what memory there is.

    uses: float [num_layers, num_experts], how often each was used in earlier runs, if known.
    share: which experts are this rank's; None: all.

    Raises CapacityError where it would be fewer than a token uses, naming the least that is enough,
    or where not even with those the keys and values fit.
    """
    options = config.experts
    layers = moe_layers(spec)
    total_bytes = weights_bytes(spec, dtype)
    if not layers:
        _warn_of_dense(options)
        return Residency(None, 0, total_bytes, 0)
    moes = [moe for index in layers if (moe := spec.layers[index].moe) is not None]
    top_k = max(moe.router.top_k for moe in moes)
    num_experts = max(moe.router.num_experts for moe in moes)
    most_held = num_experts if share is None else share.most_held
    num_held = len(layers) * num_experts if share is None else int(share.is_held.sum())
    least = min(top_k, most_held)
    slot_bytes = max(
        -(-kernels.record_bytes(spec.hidden_size, moe.intermediate_size, dtype) // RECORD_ALIGNMENT)
        * RECORD_ALIGNMENT
        for moe in moes
    )
    other_bytes = weights_bytes(spec, dtype, names_without_experts(spec))
    all_bytes = other_bytes + num_held * slot_bytes
    slots = _slots_by_options(options, len(layers), slot_bytes)
    kv_bytes = None
    if slots is None:
        free = available - other_bytes - table_bytes(config, spec, max_model_len)
        kv_room = kv_room_bytes(config, spec, dtype)
        if num_held * slot_bytes <= free - kv_room:
            slots = len(layers) * most_held
        else:
            free -= min(options.expert_stream_slots or 0, 2 * num_experts) * slot_bytes
            if _is_kv_given(config):
                slots = max(0, int((free - kv_room) * _SHARE_OF_FREE)) // slot_bytes
            else:
                demand = Demand(
                    chances=chances_of(uses, len(layers), num_experts, top_k),
                    slot_bytes=slot_bytes,
                    sequence_bytes=sequence_bytes(config, spec, dtype, max_model_len),
                    num_seqs=config.scheduler.max_num_seqs,
                    top_k=top_k,
                )
                found = divided(int(free * _SHARE_OF_FREE), demand)
                slots = 0 if found is None else found[0] * len(layers)
                kv_bytes = None if found is None else found[1]
    if options.emulate_link is not None and share is not None:
        raise ConfigError("emulate_link measures one process; leave it out where there are ranks")
    if options.emulate_link is None and slots >= len(layers) * most_held:
        if options.is_limited:
            logger.info("all %d experts of each layer are held: the budget allows it", most_held)
        _warn_of_unused(options)
        return Residency(None, slot_bytes, all_bytes, top_k)
    _refuse_unlike_layers(moes)
    _warn_of_unguided(options)
    shape = _shape(options, len(layers), num_experts, min(slots, len(layers) * most_held))
    least_bytes = other_bytes + least * len(layers) * slot_bytes
    num_kv_blocks(config, spec, dtype, max_model_len, available, least_bytes)
    _check(shape, least, slot_bytes, available, options)
    stream_slots = _stream_slots(options, shape, slot_bytes, kernels, share)
    held = other_bytes + (shape.total_slots + stream_slots) * slot_bytes
    if options.emulate_link is not None:
        held = all_bytes + shape.total_slots * slot_bytes
    if options.is_limited and held > available:
        most = (available - (held - shape.total_slots * slot_bytes)) // slot_bytes
        per_layer = max(0, most) // len(layers)
        raise CapacityError(
            f"{shape.total_slots} expert slots take {text_of(shape.total_slots * slot_bytes)}"
            + (
                f" and {stream_slots} stream slots {text_of(stream_slots * slot_bytes)}"
                if stream_slots
                else ""
            )
            + f", and the model {text_of(held)} with them, but {text_of(available)} are available; "
            + "give "
            + ("expert_stream_slots 0, or " if stream_slots else "")
            + (
                f"at most expert_cache_slots {per_layer}, or expert_cache_gb "
                f"{per_layer * len(layers) * slot_bytes / GIB:.3g}"
                if per_layer >= least
                else "the experts more memory, by a smaller model or dtype"
            )
        )
    logger.info(
        "experts: %d slots of %d bytes for %d layers of %d experts (%.0f %%), %s",
        shape.total_slots,
        slot_bytes,
        len(layers),
        most_held,
        100 * shape.total_slots / (len(layers) * most_held),
        _where_others_are(options, kernels),
    )
    return Residency(shape, slot_bytes, held, top_k, kv_bytes, stream_slots)


def _where_others_are(options: ExpertsConfig, kernels: Kernels) -> str:
    if options.emulate_link is not None:
        return "the rest in host memory"
    if kernels.name == "triton":
        return "the rest in host memory, or on disk if they do not fit"
    return "the rest on disk"


def _stream_slots(
    options: ExpertsConfig,
    shape: CacheShape,
    slot_bytes: int,
    kernels: Kernels,
    share: Share | None,
) -> int:
    given = options.expert_stream_slots
    if kernels.name != "triton" or share is not None or options.expert_store is not None:
        if given:
            logger.warning(
                "expert_stream_slots has no effect: it is for one GPU before a host's memory"
            )
        return 0
    if given is None:
        return default_places(shape, slot_bytes)
    most = most_places(shape)
    if given > most:
        logger.warning(
            "expert_stream_slots is %d, but what may be missing of two layers is %d experts: as "
            "many slots are made", given, most,
        )  # fmt: skip
    return min(given, most)


def chances_of(uses: Array | None, num_layers: int, num_experts: int, top_k: int) -> Array:
    """Return how likely a token is to use each expert, [num_layers, num_experts].

    As it was recorded; where nothing was, all are equally likely.
    """
    if uses is None:
        return np.full((num_layers, num_experts), top_k / num_experts)
    share: Array = (uses + 1) / (uses + 1).sum(axis=1, keepdims=True)
    chances: Array = np.minimum(1.0, top_k * share)
    return chances


def _is_kv_given(config: EngineConfig) -> bool:
    return config.kv.num_kv_blocks is not None or config.kv.kv_cache_gb is not None


def _slots_by_options(options: ExpertsConfig, num_layers: int, slot_bytes: int) -> int | None:
    if options.expert_cache_slots is not None:
        return options.expert_cache_slots * num_layers
    if options.expert_cache_gb is not None:
        return int(options.expert_cache_gb * GIB) // slot_bytes
    if options.emulate_link is not None:
        raise ConfigError("emulate_link needs expert_cache_slots or expert_cache_gb")
    return None


def _shape(
    options: ExpertsConfig, num_layers: int, num_experts: int, total_slots: int
) -> CacheShape:
    is_per_layer = options.expert_cache_scope == "layer"
    per_layer = total_slots // num_layers
    return CacheShape(
        num_layers=num_layers,
        num_experts=num_experts,
        slots_per_layer=per_layer if is_per_layer else None,
        total_slots=per_layer * num_layers if is_per_layer else total_slots,
    )


def _check(
    shape: CacheShape, top_k: int, slot_bytes: int, available: int, options: ExpertsConfig
) -> None:
    try:
        check_capacity(shape, top_k)
    except CapacityError as error:
        least = top_k * shape.num_layers * slot_bytes
        raise CapacityError(
            f"{error}: expert_cache_gb {least / GIB:.3g}"
            + ("" if options.is_limited else f"; {text_of(available)} of memory are available")
        ) from error


def _refuse_unlike_layers(moes: Sequence[MoeSpec]) -> None:
    """Raise ConfigError for layers that differ in how many experts there are, or are used."""
    kinds = {(moe.router.num_experts, moe.router.top_k) for moe in moes}
    if len(kinds) > 1:
        raise ConfigError(
            f"the layers have {sorted(kinds)} (experts, experts of a token), and only where all "
            "are alike can a part of them be held: give the experts more memory, or none of the "
            "options that limit it"
        )


def _warn_of_unused(options: ExpertsConfig) -> None:
    """Say which options do nothing where all experts are held."""
    given = [name for name in changed(options) if name in _OF_A_CACHE]
    if given:
        logger.warning("all experts are held, so there is no effect of: %s", ", ".join(given))


def _warn_of_unguided(options: ExpertsConfig) -> None:
    """Say which options of a cache do nothing beside the others."""
    given = [name for name in changed(options) if name in ("predictor", "predictor_state")]
    if options.prefetch == "off" and given:
        logger.warning("prefetch is off, so there is no effect of: %s", ", ".join(given))
    if options.eviction == "static" and options.usage_profile is None:
        logger.warning(
            "eviction static keeps what was used most, which it counts for a while first: give a "
            "usage_profile of an earlier run"
        )


def _warn_of_dense(options: ExpertsConfig) -> None:
    """Say that options about experts do nothing for a dense model."""
    given = changed(options)
    if given:
        logger.warning(
            "the model is dense: it has no experts, so there is nothing to cache or to record; "
            "no effect: %s",
            ", ".join(given),
        )
