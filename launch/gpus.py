"""Which GPU is whose: the ranks of a machine take its GPUs in their order, one each."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe_serve.errors import ConfigError
from moe_serve.launch.environment import RankEnvironment


def take_gpu(environment: RankEnvironment) -> None:
    """Make the GPU of this rank's number on its machine the one that this process uses.

    Raises ConfigError where there are fewer than ranks, or torch cannot connect GPUs.
    """
    check_gpus(environment.local_world_size)
    torch.cuda.set_device(environment.local_rank)


def check_gpus(num_ranks: int) -> None:
    """Raise ConfigError where a machine has no GPU for each of its ranks, or cannot connect them.

    A rank alone needs no connection.
    """
    num_gpus = torch.cuda.device_count()
    if num_gpus < num_ranks:
        raise ConfigError(
            f"{num_ranks} ranks on this machine, but {num_gpus} of its GPUs are to be seen: each "
            "rank takes one; start fewer (--ep, or torchrun's --nproc-per-node), or let all ranks "
            "see the same GPUs, as many as there are ranks (CUDA_VISIBLE_DEVICES)"
        )
    if num_ranks > 1 and not dist.is_nccl_available():
        raise ConfigError("this torch was built without NCCL, by which GPUs exchange; install one")
