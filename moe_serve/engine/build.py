"""Put an engine together from options and a folder: the one place that makes all its parts."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moe_serve import plugin
from moe_serve.config import EngineConfig, changed
from moe_serve.engine.device_memory import room_on
from moe_serve.engine.engine import Engine
from moe_serve.engine.expert_parts import ExpertParts, model_id_of, read_usage
from moe_serve.engine.grammar import Grammars
from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.engine.lockstep import LockstepEngine, LockstepRunner
from moe_serve.engine.memory import num_kv_blocks
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.engine.policies.base import Policy
from moe_serve.engine.rank_parts import RankParts
from moe_serve.engine.ranks import Ranks
from moe_serve.engine.residency import Residency, plan_residency
from moe_serve.engine.sampler import Sampler
from moe_serve.engine.scheduler import Scheduler
from moe_serve.engine.warm_up import compiles_late
from moe_serve.errors import ConfigError
from moe_serve.kernels import suite
from moe_serve.models.decoder import Decoder
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.types import DTYPES

logger = logging.getLogger(__name__)


def build_engine(
    config: EngineConfig,
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    ranks: Ranks | None = None,
) -> Engine:
    """Load the model in `folder` and return an engine ready to run.

    on_progress is called with (bytes read, bytes in all). ranks: those that this process is one
    of; every one of them must call this. Raises CommError where they are not alike, ConfigError for
    an option that this model cannot have, CheckpointError for a folder that cannot be loaded,
    CapacityError, before any weight is read, for what the memory that is free now cannot hold.
    """
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    elif ranks is not None:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.num_here))
    scheduling = config.scheduler.scheduling_policy
    policy = plugin.load("moe_serve.engine.policies", scheduling, "scheduling_policy").build()
    kernels = suite.load(config.runtime.kernels, config.runtime.isa, config.runtime.numerics)
    if not config.runtime.fused and kernels.build_forward is None:
        logger.warning("fused=False has no effect: the %s kernels run one by one", kernels.name)
    if kernels.device.type == "cpu" and "gpu_memory_utilization" in changed(config.runtime):
        logger.warning("gpu_memory_utilization has no effect: no GPU is used")
    hf_config = HFConfig.read(folder)
    spec = read_spec(hf_config)
    dtype = dtype_of(config.weights.dtype, hf_config.dtype)
    max_model_len = context_of(config.weights.max_model_len, spec.max_position_embeddings)
    room = room_on(kernels.device, config, spec, dtype)
    available = room.num_bytes
    rank = None
    if ranks is not None:
        if kernels.device.type == "cpu":  # a GPU is one rank's alone
            available //= ranks.num_here
        rank = RankParts(config, spec, ranks, model_id_of(config, folder))
    share = None if rank is None else rank.share
    keeper = read_usage(config, spec, folder, share)
    uses = None if keeper is None else keeper.before.uses
    residency = plan_residency(config, spec, dtype, kernels, max_model_len, available, uses, share)
    num_blocks = num_kv_blocks(
        config,
        spec,
        dtype,
        max_model_len,
        available,
        residency.model_bytes,
        residency.kv_bytes,
        room.kv_share,
    )
    numerics_id = f"{kernels.numerics_id}-{str(dtype).removeprefix('torch.')}"
    is_cached = residency.shape is not None
    if kernels.name == "triton" and is_cached and config.experts.miss == "split":
        numerics_id += "-split"  # the host rounds otherwise
    if rank is not None:
        numerics_id += rank.numerics_suffix
        rank.agree(numerics_id, residency)
    parts = ExpertParts(
        config, spec, dtype, kernels, residency, folder, numerics_id, keeper, on_progress, share
    )
    weights, experts = parts.load()
    try:
        dispatcher = None
        if rank is not None:
            experts, dispatcher = rank.experts(experts), rank.dispatcher(kernels)
        model = Decoder(spec, weights, experts, kernels, max_model_len, dispatcher)
        tokenizer = config.weights.tokenizer
        grammars = Grammars(
            folder if tokenizer is None else Path(tokenizer).expanduser(), spec.vocab_size
        )
        return _engine(
            config, policy, model, grammars, residency, num_blocks, numerics_id, clock, rank
        )
    except BaseException:
        experts.abandon()
        raise


def _engine(
    config: EngineConfig,
    policy: Policy,
    model: Decoder,
    grammars: Grammars,
    residency: Residency,
    num_blocks: tuple[int, ...],
    numerics_id: str,
    clock: Callable[[], float],
    rank: RankParts | None,
) -> Engine:
    """Put an engine around a model that is loaded."""
    spec, max_model_len, kernels = model.spec, model.max_model_len, model.kernels
    block_size = config.kv.block_size
    kv = KVCacheManager(
        model.groups,
        num_blocks,
        block_size,
        config.scheduler.max_num_seqs,
        max_model_len,
        config.kv.enable_prefix_caching,
    )
    scheduler = Scheduler(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_prefill_chunk=config.scheduler.max_prefill_chunk,
        policy=policy,
        kv=kv,
        max_model_len=max_model_len,
        clock=clock,
        admission_horizon=config.scheduler.admission_horizon,
    )
    sampler = Sampler(spec.vocab_size, kernels.device, kernels.sampling)
    kv_bytes = sum(
        (count + 1) * block_size * group.bytes_per_token
        for count, group in zip(num_blocks, model.groups, strict=True)
    )
    runner_type = ModelRunner if rank is None else LockstepRunner
    may_return_routing = config.experts.enable_return_routed_experts
    runner = runner_type(model, kv, num_blocks, sampler, config.runtime.fused, may_return_routing)
    num_ranks = 1 if rank is None else rank.world.size
    if compiles_late(kernels.device):
        rehearsals = [] if rank is None else rank.rehearsals(kernels)
        runner.warm_up(config.scheduler.max_num_batched_tokens, rehearsals, num_ranks)
    if rank is not None:
        rank.meet(model, residency.top_k)
    build = Engine if rank is None else functools.partial(LockstepEngine, rank)
    return build(
        config,
        spec,
        scheduler,
        runner,
        grammars,
        max_model_len=max_model_len,
        numerics_id=numerics_id,
        model_bytes=residency.model_bytes,
        kv_bytes=kv_bytes,
    )


def dtype_of(wanted: str, checkpoint: torch.dtype) -> torch.dtype:
    """Resolve the dtype option; float16 checkpoints run in bfloat16, which CPUs multiply."""
    if wanted != "auto":
        return DTYPES[wanted]
    if checkpoint == torch.float16:
        logger.warning("the checkpoint is float16; it runs in bfloat16 (--dtype float32 is exact)")
        return torch.bfloat16
    return checkpoint


def context_of(wanted: int | None, limit: int) -> int:
    """Resolve max_model_len; limit: the model's own. Raises ConfigError above that."""
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model's context is {limit} "
            "(max_position_embeddings); use at most that"
        )
    return wanted or limit
