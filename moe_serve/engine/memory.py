"""How much memory there is, and how much the KV cache gets: settled before anything is made."""

from __future__ import annotations

import logging
import os
import resource
import sys
from pathlib import Path

import torch

from moe_serve.config import EngineConfig
from moe_serve.errors import CapacityError
from moe_serve.models.spec import ModelSpec

logger = logging.getLogger(__name__)

# of the memory that is free once the weights are there; the rest is for work space and others
KV_SHARE = 0.25
# what the block pool itself keeps of a block: an entry in three lists and an int
_POOL_BYTES_PER_BLOCK = 64
_TABLE_ENTRY_BYTES = 4
GIB = 2**30
_UNKNOWN = 4 * GIB


def num_kv_blocks(
    config: EngineConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    max_model_len: int,
    available: int,
    weights: int,
    kv_bytes: int | None = None,
    kv_share: float = KV_SHARE,
) -> tuple[int, ...]:
    """Return how many usable blocks each cache group gets: the same number for all.

    As the options say, or else enough for `max_num_seqs` requests of full length, but at most
    `kv_share` of what the model leaves of `available` bytes. weights: the bytes of the model's
    weights that are held; kv_bytes: what keys and values get where the options do not say. Raises
    CapacityError when weights, tables and blocks together need more than is available.
    """
    groups = spec.cache_groups(dtype.itemsize)
    tokens_bytes = sum(group.bytes_per_token for group in groups) * config.kv.block_size
    block_bytes = tokens_bytes + _POOL_BYTES_PER_BLOCK * len(groups)
    blocks_per_request = -(-max_model_len // config.kv.block_size)
    tables = table_bytes(config, spec, max_model_len)
    free = available - weights - tables
    if free < 0:
        raise CapacityError(
            f"the model needs {text_of(weights)} for its weights and {text_of(tables)} for the "
            f"rotary table and the block tables of {config.scheduler.max_num_seqs} requests of "
            f"max_model_len {max_model_len}, but {text_of(available)} are available; "
            + (
                "use a smaller model or dtype"
                if weights > available
                else "lower max_model_len or max_num_seqs"
            )
        )
    if config.kv.num_kv_blocks is not None:
        count = config.kv.num_kv_blocks
    elif config.kv.kv_cache_gb is not None:
        count = int(config.kv.kv_cache_gb * GIB) // tokens_bytes
        if count < 1:
            raise CapacityError(
                f"kv_cache_gb is {config.kv.kv_cache_gb:g}, less than one block of "
                f"{config.kv.block_size} tokens ({tokens_bytes} bytes)"
            )
    else:
        wanted = blocks_per_request * config.scheduler.max_num_seqs
        share = int(free * kv_share) if kv_bytes is None else min(free, kv_bytes)
        count = max(1, min(wanted, share // block_bytes))
        if count < wanted and kv_bytes is None:
            logger.info(
                "KV cache: %d blocks of %d tokens, %.0f %% of the free memory; %d requests of "
                "full length (%d tokens) would fill %d: lower max_model_len, or give kv_cache_gb",
                count,
                config.kv.block_size,
                100 * kv_share,
                config.scheduler.max_num_seqs,
                max_model_len,
                wanted,
            )
    kv = (count + 1) * block_bytes  # one more: the null block
    if kv > free:
        most = free // block_bytes - 1
        raise CapacityError(
            f"{count} KV blocks of {config.kv.block_size} tokens need {text_of(kv)} and the model "
            f"{text_of(weights + tables)}, but {text_of(available)} are available; "
            + (
                f"give at most num_kv_blocks {most} or kv_cache_gb {most * tokens_bytes / GIB:.3g}"
                if most > 0
                else "use a smaller model or dtype, or a lower max_model_len"
            )
        )
    return (count,) * len(groups)


def table_bytes(config: EngineConfig, spec: ModelSpec, max_model_len: int) -> int:
    """Return what the rotary table and the block tables of all requests take."""
    blocks_per_request = -(-max_model_len // config.kv.block_size)
    num_groups = len(spec.cache_groups(1))
    entries = num_groups * config.scheduler.max_num_seqs * blocks_per_request
    return _rotary_bytes(spec, max_model_len) + entries * _TABLE_ENTRY_BYTES


def kv_room_bytes(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return what the options set aside for keys and values, or else one full step's tokens."""
    token_bytes = sum(group.bytes_per_token for group in spec.cache_groups(dtype.itemsize))
    if config.kv.kv_cache_gb is not None:
        return int(config.kv.kv_cache_gb * GIB)
    if config.kv.num_kv_blocks is not None:
        return config.kv.num_kv_blocks * config.kv.block_size * token_bytes
    return config.scheduler.max_num_batched_tokens * token_bytes


def sequence_bytes(
    config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, max_model_len: int
) -> int:
    """Return what one running sequence holds in keys and values: half of its full length."""
    token_bytes = sum(group.bytes_per_token for group in spec.cache_groups(dtype.itemsize))
    return max(config.kv.block_size, max_model_len // 2) * token_bytes


def _rotary_bytes(spec: ModelSpec, max_model_len: int) -> int:
    """Return what the rotary table takes while it is made: cos, sin, and as much to make them."""
    return max_model_len * spec.attention.head_dim * torch.float32.itemsize * 2


def text_of(num_bytes: int) -> str:
    return f"{num_bytes} bytes ({num_bytes / GIB:.3g} GiB)"


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Return the most memory this process has held at once.

    Linux's getrusage also counts what the process was forked from.
    """
    peak = _field(status, "VmHWM:")
    if peak is not None:
        return peak * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many bytes this process can still take without pushing anything out to swap.

    proc, cgroups: where the system shows itself. The page cache counts as available, as it gives
    way. Where the system tells nothing, 4 GiB.
    """
    found = [
        num_bytes
        for num_bytes in (
            _machine_bytes(proc),
            _cgroup_bytes(proc, cgroups),
            *_limit_bytes(proc),
        )
        if num_bytes is not None
    ]
    return max(0, min(found, default=_UNKNOWN))


def _machine_bytes(proc: Path) -> int | None:
    available = _field(proc / "meminfo", "MemAvailable:")
    if available is not None:
        return available * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # a name that this system does not know
        return None


def _limit_bytes(proc: Path) -> list[int]:
    """Return what the limits of this process leave (`ulimit -d`, `-v`), as far as there are any."""
    status = proc / "self" / "status"
    found = []
    for kind, name in ((resource.RLIMIT_DATA, "VmData:"), (resource.RLIMIT_AS, "VmSize:")):
        limit = resource.getrlimit(kind)[0]
        used = _field(status, name)
        if limit != resource.RLIM_INFINITY and used is not None:
            found.append(limit - used * 1024)
    return found


def _cgroup_bytes(proc: Path, cgroups: Path) -> int | None:
    """Return what the tightest cgroup (v2) around this process leaves, or None without a limit."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return None
    folder = cgroups / own
    left = [_left_in(group) for group in (folder, *folder.parents) if group.is_relative_to(cgroups)]
    return min((num_bytes for num_bytes in left if num_bytes is not None), default=None)


def _left_in(group: Path) -> int | None:
    """Return the limit of one cgroup less what it holds; files' pages that can go do not count."""
    try:
        limit = int((group / "memory.max").read_text())
        current = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return limit - current + (_field(group / "memory.stat", "inactive_file") or 0)


def _field(path: Path, name: str) -> int | None:
    """Return the number after `name` in a file of lines "name number ...", or None."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    words = (line.split() for line in lines)
    return next((int(w[1]) for w in words if len(w) > 1 and w[0] == name), None)
