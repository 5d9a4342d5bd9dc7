"""Fill a model's tensors from a folder of safetensors files.

Presence, shape and dtype of all that the model needs are checked against its `ModelSpec` before
anything is allocated. Weights are then read straight into place: memory at its peak is the model
and a few small buffers. Does not know what the tensors are for.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_serve.errors import CapacityError, CheckpointError
from moe_serve.models.checkpoint_folder import Checkpoint, raise_if_any
from moe_serve.models.hf_config import CONFIG_FILE
from moe_serve.models.safetensors_file import TensorInfo, opened, read_into
from moe_serve.models.spec import ModelSpec, Part, WeightSpec

logger = logging.getLogger(__name__)


DTYPE_OF_NAME = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}

RUN_ELEMENTS = 2**23  # one task of a reading thread
PIECE_BYTES = 2**20  # read, then checked while it is still in the processor's cache
MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class _Read:
    """One tensor of the checkpoint, and the box in tensor `target` that it fills."""

    info: TensorInfo
    target: str
    box: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive elements of a stored tensor, from `first`, and the flat tensor to fill."""

    info: TensorInfo
    first: int
    into: Tensor


def load_weights(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return every tensor of `spec.weights` by name, read from `folder`, in `dtype`.

    Those that are `is_fp32` come in float32. into: tensors, by name, to fill instead of new ones;
    their last two dimensions must be contiguous. on_progress(bytes read, bytes in all) is called in
    this thread as the reading goes on. Raises CheckpointError naming file and tensor for whatever
    is missing, of another shape or dtype, or not finite once in its dtype; CapacityError when
    memory does not suffice.
    """
    checkpoint = Checkpoint.open(folder)
    reads = _plan(checkpoint, spec)
    _report_unused(checkpoint, spec, reads)
    weights = allocated(spec, dtype, device, into or {})
    _read_all(reads, weights, on_progress)
    return weights


def weights_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return what all weights of `spec` take, in bytes."""
    return sum(weight.num_elements * held_dtype(weight, dtype).itemsize for weight in spec.weights)


def held_dtype(weight: WeightSpec, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that `weight` is held in by a model of `dtype`."""
    return torch.float32 if weight.is_fp32 else dtype


def allocated(
    spec: ModelSpec, dtype: torch.dtype, device: str | torch.device, into: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a tensor for each weight of `spec`, not filled: that of `into`, or else a new one."""
    total = weights_bytes(spec, dtype)
    return {
        weight.name: into[weight.name]
        if weight.name in into
        else empty_weight(weight, dtype, device, total)
        for weight in spec.weights
    }


def empty_weight(
    weight: WeightSpec, dtype: torch.dtype, device: str | torch.device, total_bytes: int
) -> Tensor:
    """Allocate `weight`, not filled; total_bytes, of the whole model, is for the message."""
    held = held_dtype(weight, dtype)
    try:
        return torch.empty(weight.shape, dtype=held, device=device)
    except (RuntimeError, MemoryError) as error:
        raise CapacityError(
            f"{weight.name}: no memory for its {weight.num_elements * held.itemsize} bytes on "
            f"{device}; the model's weights take {total_bytes} bytes in all: use a smaller model "
            "or dtype"
        ) from error


def _plan(checkpoint: Checkpoint, spec: ModelSpec) -> list[_Read]:
    """Choose each weight's layout; list what to read, in the files' order. Nothing is read."""
    reads: list[_Read] = []
    problems: list[str] = []
    for weight in spec.weights:
        layout = _chosen_layout(weight, checkpoint.tensors)
        covered = sum(math.prod(part.shape) for part in layout)
        assert covered == weight.num_elements, f"the parts of {weight.name} do not fill it"
        for part in layout:
            info = checkpoint.tensors.get(part.source)
            problem = _problem(checkpoint, part, info)
            if problem is not None:
                problems.append(problem)
            elif info is not None:
                reads.append(_Read(info, weight.name, _box(weight, part)))
    raise_if_any(checkpoint.folder, problems)
    return sorted(reads, key=lambda read: (str(read.info.path), read.info.offset))


def _chosen_layout(weight: WeightSpec, tensors: dict[str, TensorInfo]) -> tuple[Part, ...]:
    """Return the first layout that lacks nothing, or else the one that lacks the least."""
    return min(
        weight.layouts, key=lambda layout: sum(part.source not in tensors for part in layout)
    )


def _problem(checkpoint: Checkpoint, part: Part, info: TensorInfo | None) -> str | None:
    """Say what keeps `part` from being read, or None."""
    if info is None:
        return f"{checkpoint.listing}: has no tensor {part.source}, of shape {list(part.shape)}"
    if info.dtype not in DTYPE_OF_NAME:
        return (
            f"{info.path}: {info.name} is held in {info.dtype}; {', '.join(DTYPE_OF_NAME)} are "
            "read, quantised checkpoints are not supported yet"
        )
    if info.shape != part.shape:
        return (
            f"{info.path}: {info.name} has shape {list(info.shape)}; "
            f"by {CONFIG_FILE} it must be {list(part.shape)}"
        )
    return None


def _box(weight: WeightSpec, part: Part) -> tuple[slice, ...]:
    """Return where `part` lies in its target; 1 wide in the dimensions that it lacks."""
    sizes = (1,) * (len(weight.shape) - len(part.shape)) + part.shape
    box = tuple(slice(a, a + n) for a, n in zip(part.start, sizes, strict=True))
    assert all(s.stop <= n for s, n in zip(box, weight.shape, strict=True)), part
    return box


def _report_unused(checkpoint: Checkpoint, spec: ModelSpec, reads: Sequence[_Read]) -> None:
    """Warn of tensors that the model does not use, but for those that never matter."""
    used = {read.info.name for read in reads}
    unused = [
        name
        for name in checkpoint.tensors
        if name not in used
        and not name.endswith("rotary_emb.inv_freq")
        and not (spec.is_embedding_tied and name == "lm_head.weight")
    ]
    if unused:
        logger.warning(
            "%s: %d tensors are not used by %s: %s%s",
            checkpoint.listing,
            len(unused),
            spec.model_type,
            ", ".join(unused[:3]),
            ", ..." if len(unused) > 3 else "",
        )


def _read_all(
    reads: Sequence[_Read],
    weights: dict[str, Tensor],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Fill `weights` by `reads`, with a few threads: the system copies while others wait."""
    total = sum(read.info.num_bytes for read in reads)
    done = 0
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(opened(path))
            for path in dict.fromkeys(read.info.path for read in reads)
        }
        pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "read-weights")
        # Entered last, so left first: no thread may read from a descriptor that was closed.
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        tasks = [
            pool.submit(_read_run, run, files[run.info.path])
            for read in reads
            for run in _runs(read.info, weights[read.target][read.box], 0)
        ]
        for task in tasks:
            done += task.result()
            if on_progress is not None:
                on_progress(done, total)


def _runs(info: TensorInfo, view: Tensor, first: int) -> Iterator[_Run]:
    """Cut `view` into pieces that lie in one stretch of memory, in the file's order."""
    if view.is_contiguous():
        flat = view.view(-1)
        for start in range(0, flat.numel(), RUN_ELEMENTS):
            yield _Run(info, first + start, flat[start : start + RUN_ELEMENTS])
        return
    for index, row in enumerate(view):
        yield from _runs(info, row, first + index * row.numel())


def _read_run(run: _Run, descriptor: int) -> int:
    """Fill one run, piece by piece, checking that all is finite; return how many bytes it took."""
    stored = DTYPE_OF_NAME[run.info.dtype]
    is_on_host = run.into.device.type == "cpu"
    is_direct = is_on_host and stored == run.into.dtype
    size = PIECE_BYTES // stored.itemsize
    buffer = torch.empty(0 if is_direct else min(size, run.into.numel()), dtype=stored)
    for start in range(0, run.into.numel(), size):
        target = run.into[start : start + size]
        source = target if is_direct else buffer[: target.numel()]
        offset = run.info.offset + (run.first + start) * stored.itemsize
        read_into(descriptor, offset, _bytes_of(source).data, run.info.path)
        if not is_direct:
            target.copy_(source)
        # On a device what is read is checked as it will be there, but on this side of the copy.
        if not is_finite(target if is_on_host else source.to(target.dtype)):
            raise _not_finite(run.info, run.first + start, source, target.dtype)
    return run.into.numel() * stored.itemsize


def _bytes_of(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the memory of a contiguous CPU tensor as bytes, shared."""
    return tensor.view(torch.uint8).numpy()


def is_finite(tensor: Tensor) -> bool:
    """Return whether a contiguous CPU tensor of a float dtype holds no NaN and no infinity.

    Adding the bits to themselves drops the sign; what is not finite is then the largest of all.
    Reads at tens of GB/s, where torch.isfinite makes 2 with bfloat16.
    """
    bits = _bytes_of(tensor.view(-1)).view(f"u{tensor.dtype.itemsize}")
    infinity = torch.tensor([torch.inf], dtype=tensor.dtype)
    limit = _bytes_of(infinity).view(bits.dtype)
    return tensor.numel() == 0 or bool((bits + bits).max() < (limit + limit)[0])


def _not_finite(info: TensorInfo, first: int, source: Tensor, held: torch.dtype) -> CheckpointError:
    """Say which element of `source`, that begins at element `first`, is not finite in `held`."""
    index = int((~torch.isfinite(source.to(held))).nonzero()[0])
    value = source[index].item()
    position = f"{info.path}: {info.name} holds {value:g} at element {first + index}"
    if np.isfinite(value):
        name = str(held).removeprefix("torch.")
        return CheckpointError(
            f"{position}, which does not fit {name} (at most {torch.finfo(held).max:g}); "
            "use a wider dtype"
        )
    return CheckpointError(f"{position}; weights must be finite: fetch the file again")
