"""Fill a model's tensors from a folder of safetensors files.

Presence, shape and dtype of all that the model needs are checked against its `ModelSpec` before
anything is allocated. Weights are then read straight into place: memory at its peak is the model
and a few small buffers. Does not know what the tensors are for.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

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
    """A tensor of the checkpoint, from element `first`, and the box of `target` that it fills."""

    info: TensorInfo
    target: str
    box: tuple[slice, ...]
    first: int = 0

    @property
    def num_bytes(self) -> int:
        num_elements = math.prod(_sizes(self.box))
        return num_elements * DTYPE_OF_NAME[self.info.dtype].itemsize

    @property
    def place(self) -> tuple[str, int]:
        """Where it begins, so that reads can be put in the files' order."""
        return str(self.info.path), self.info.offset


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
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return every tensor of `spec.weights` by name, read from `folder`, in `dtype`.

    Those that are `is_fp32` come in float32. into: tensors, by name, to fill instead of new ones;
    their last two dimensions must be contiguous. names: of the weights to read, None for all; the
    others are checked too, as far as the headers tell. on_progress(bytes read, bytes in all) is
    called in this thread as the reading goes on. Raises CheckpointError naming file and tensor for
    whatever is missing, of another shape or dtype, or not finite once in its dtype; CapacityError
    when memory does not suffice.
    """
    reader = WeightReader.open(folder, spec)
    reader.report_unused()
    weights = allocated(spec, dtype, device, into or {}, names)
    reader.read(weights, on_progress=on_progress)
    return weights


class WeightReader:
    """The weights in a folder that was checked once, read in the parts that are asked for."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        """Plan all reads. Raises CheckpointError for what is missing, or cannot be read."""
        self._checkpoint = checkpoint
        self._spec = spec
        self._reads: dict[str, list[_Read]] = {}
        for read in _plan(checkpoint, spec):
            self._reads.setdefault(read.target, []).append(read)

    @classmethod
    def open(cls, folder: Path, spec: ModelSpec) -> Self:
        """Read and check the headers in `folder`; raises CheckpointError. No weight is read."""
        return cls(Checkpoint.open(folder), spec)

    def report_unused(self) -> None:
        """Warn of tensors that the model does not use, but for those that never matter."""
        used = [read for reads in self._reads.values() for read in reads]
        _report_unused(self._checkpoint, self._spec, used)

    def read(
        self,
        weights: Mapping[str, Tensor],
        rows: range | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Fill `weights`, tensors by the names of the spec, as `load_weights` does.

        rows: of each weight's first dimension (of experts' weights: experts); the tensors then hold
        these alone. None for all.
        """
        reads = [read for name in weights for read in self._reads.get(name, ())]
        if rows is not None:
            reads = [part for read in reads if (part := _in_rows(read, rows)) is not None]
        _read_all(sorted(reads, key=lambda read: read.place), weights, on_progress)


def weights_bytes(spec: ModelSpec, dtype: torch.dtype, names: Collection[str] | None = None) -> int:
    """Return what the weights of `spec` take, in bytes: all, or those that `names` has."""
    return sum(
        weight.num_elements * held_dtype(weight, dtype).itemsize for weight in selected(spec, names)
    )


def selected(spec: ModelSpec, names: Collection[str] | None) -> list[WeightSpec]:
    """Return the weights of `spec` that `names` has, in the spec's order; None for all."""
    return [weight for weight in spec.weights if names is None or weight.name in names]


def held_dtype(weight: WeightSpec, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that `weight` is held in by a model of `dtype`."""
    return torch.float32 if weight.is_fp32 else dtype


def allocated(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: str | torch.device,
    into: Mapping[str, Tensor],
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Return a tensor for each weight that is `selected`: that of `into`, or else a new one.

    They are not filled.
    """
    total = weights_bytes(spec, dtype, names)
    return {
        weight.name: into[weight.name]
        if weight.name in into
        else empty_weight(weight, dtype, device, total)
        for weight in selected(spec, names)
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
    """Choose each weight's layout; list what to read. Nothing is read."""
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
    return reads


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


def _sizes(box: tuple[slice, ...]) -> list[int]:
    return [part.stop - part.start for part in box]


def _in_rows(read: _Read, rows: range) -> _Read | None:
    """Cut a read to some rows of its target, which begins with the first of them.

    None where it has none of them. A part of the checkpoint lies in the order of its target's rows,
    so that a cut is one stretch too.
    """
    whole = read.box[0]
    begin, end = max(whole.start, rows.start), min(whole.stop, rows.stop)
    if begin >= end:
        return None
    row_elements = math.prod(_sizes(read.box[1:]))
    box = (slice(begin - rows.start, end - rows.start), *read.box[1:])
    first = read.first + (begin - whole.start) * row_elements
    return _Read(read.info, read.target, box, first)


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
    weights: Mapping[str, Tensor],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Fill `weights` by `reads`, with a few threads: the system copies while others wait."""
    total = sum(read.num_bytes for read in reads)
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
            for run in _runs(read.info, weights[read.target][read.box], read.first)
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
