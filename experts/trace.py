"""A trace: which experts every token of a run used, layer by layer; files of it are .npz."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_serve.errors import TraceError
from moe_serve.experts.output_file import whole_file

Array = np.ndarray[Any, Any]
_NEEDED = ("ids", "weights", "seq_offsets", "layer_ids", "num_experts", "top_k")
PREFILL, DECODE = 0, 1
_MOST_EXPERTS = 2**16


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """Routing of whole sequences.

    ids: uint8 (uint16 above 256 experts) [num_tokens, num_layers, top_k], heaviest first; weights:
    float16 or float32, alike. seq_offsets: int64 [num_seqs + 1], sequence i is rows
    seq_offsets[i] to seq_offsets[i + 1]. layer_ids: the model's layers that have experts.
    step: int32 [num_tokens], the engine's step in which a token ran, or None; phase: uint8, 0 for
    prompt tokens and 1 for decoded ones, or None; token_ids: int32, or None.
    """

    name: str
    ids: Array
    weights: Array
    seq_offsets: Array
    layer_ids: Array
    num_experts: int
    top_k: int
    step: Array | None = None
    phase: Array | None = None
    token_ids: Array | None = None
    model_id: str | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.ids.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def num_seqs(self) -> int:
        return len(self.seq_offsets) - 1

    def sequences(self, first: int, last: int) -> Trace:
        """Return the sequences `first` to `last` (not included) as a trace of their own."""
        begin, end = int(self.seq_offsets[first]), int(self.seq_offsets[last])

        def part(array: Array | None) -> Array | None:
            return None if array is None else array[begin:end]

        return Trace(
            name=f"{self.name}[{first}:{last}]",
            ids=self.ids[begin:end],
            weights=self.weights[begin:end],
            seq_offsets=self.seq_offsets[first : last + 1] - begin,
            layer_ids=self.layer_ids,
            num_experts=self.num_experts,
            top_k=self.top_k,
            step=part(self.step),
            phase=part(self.phase),
            token_ids=part(self.token_ids),
            model_id=self.model_id,
        )


def join_traces(parts: Sequence[Path], target: Path) -> None:
    """Write one trace of what several ranks recorded, by rank; their files are removed.

    Raises TraceError.
    """
    traces = [read_trace(path) for path in parts]
    first, lengths = traces[0], [trace.num_tokens for trace in traces]
    starts = np.cumsum([0, *lengths[:-1]])

    def column(name: str) -> Array | None:
        found = [getattr(trace, name) for trace in traces]
        return None if any(one is None for one in found) else np.concatenate(found)

    offsets = [t.seq_offsets[:-1] + start for t, start in zip(traces, starts, strict=True)]
    joined = replace(
        first,
        name=target.stem,
        ids=np.concatenate([trace.ids for trace in traces]),
        weights=np.concatenate([trace.weights for trace in traces]),
        seq_offsets=np.append(np.concatenate(offsets), sum(lengths)).astype(np.int64),
        step=column("step"),
        phase=column("phase"),
        token_ids=column("token_ids"),
    )
    write_trace(target, joined)
    for path in parts:
        path.unlink()


def read_trace(path: Path) -> Trace:
    """Read a .npz file of a trace. Raises TraceError for what is not one, naming the field."""
    try:
        with zipfile.ZipFile(path):  # so that what is no archive is not read as an array
            pass
        with np.load(path, allow_pickle=False) as file:
            fields = {name: file[name] for name in file.files}
    except Exception as error:  # numpy and zipfile raise a dozen kinds on damaged files
        raise TraceError(f"{path}: not a trace, an .npz file of arrays ({error})") from error
    _check_kinds(path, fields)
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise TraceError(f"{path}: not a trace: it has no {', '.join(missing)}")
    trace = Trace(
        name=path.stem,
        ids=fields["ids"],
        weights=fields["weights"],
        seq_offsets=fields["seq_offsets"].astype(np.int64),
        layer_ids=fields["layer_ids"].astype(np.int64),
        num_experts=_count(path, fields, "num_experts"),
        top_k=_count(path, fields, "top_k"),
        step=fields.get("step"),
        phase=fields.get("phase"),
        token_ids=fields.get("token_ids"),
        model_id=str(fields["model_id"]) if "model_id" in fields else None,
    )
    _check(path, trace)
    return trace


def _check_kinds(path: Path, fields: dict[str, Array]) -> None:
    """Refuse arrays of another kind or number of dimensions than theirs."""
    wanted = {
        "ids": (3, np.integer),
        "weights": (3, np.floating),
        "seq_offsets": (1, np.integer),
        "layer_ids": (1, np.integer),
        "step": (1, np.integer),
        "phase": (1, np.integer),
        "token_ids": (1, np.integer),
    }
    for name, (num_dimensions, kind) in wanted.items():
        array = fields.get(name)
        if array is not None and (
            array.ndim != num_dimensions or not np.issubdtype(array.dtype, kind)
        ):
            raise TraceError(
                f"{path}: {name} is {array.dtype} of {array.ndim} dimensions; it must be "
                f"{kind.__name__} of {num_dimensions}"
            )


def _count(path: Path, fields: dict[str, Array], name: str) -> int:
    if fields[name].shape != () or not np.issubdtype(fields[name].dtype, np.integer):
        raise TraceError(f"{path}: {name} must be one integer")
    return int(fields[name])


def _check(path: Path, trace: Trace) -> None:
    """Refuse a trace whose arrays do not fit together."""
    if not len(trace.layer_ids):
        raise TraceError(f"{path}: a trace of no layers")
    if not 1 <= trace.num_experts <= _MOST_EXPERTS:
        raise TraceError(
            f"{path}: num_experts is {trace.num_experts}; up to {_MOST_EXPERTS} can be"
        )
    if trace.step is not None and trace.num_tokens:
        first, last = int(trace.step.min()), int(trace.step.max())
        if not 0 <= first <= last < 2**31:
            raise TraceError(
                f"{path}: steps go from {first} to {last}; they must be 0 to 2**31 - 1"
            )
    shape = (trace.num_tokens, len(trace.layer_ids), trace.top_k)
    if trace.ids.ndim != 3 or trace.ids.shape != shape or trace.weights.shape != shape:
        raise TraceError(
            f"{path}: ids are {list(trace.ids.shape)} and weights {list(trace.weights.shape)}; "
            f"both must be [tokens, {len(trace.layer_ids)} layers, top_k {trace.top_k}]"
        )
    if (
        trace.num_tokens
        and not 0 <= int(trace.ids.min()) <= int(trace.ids.max()) < trace.num_experts
    ):
        raise TraceError(
            f"{path}: ids go from {trace.ids.min()} to {trace.ids.max()}, but there are "
            f"{trace.num_experts} experts"
        )
    if not 1 <= trace.top_k <= trace.num_experts:
        raise TraceError(f"{path}: top_k is {trace.top_k} of {trace.num_experts} experts")
    offsets = trace.seq_offsets
    is_partition = (
        offsets.ndim == 1
        and len(offsets) > 0
        and offsets[0] == 0
        and offsets[-1] == trace.num_tokens
        and bool((np.diff(offsets) >= 0).all())
    )
    if not is_partition:
        raise TraceError(f"{path}: seq_offsets must rise from 0 to {trace.num_tokens}")
    for name in ("step", "phase", "token_ids"):
        array = getattr(trace, name)
        if array is not None and array.shape != (trace.num_tokens,):
            raise TraceError(f"{path}: {name} is {list(array.shape)}; one per token is needed")


def write_trace(path: Path, trace: Trace) -> None:
    """Write `trace`, so that `read_trace` gives it back; the file appears whole or not at all.

    Raises TraceError where it cannot be written.
    """
    fields: dict[str, Any] = {
        "ids": trace.ids,
        "weights": trace.weights,
        "seq_offsets": trace.seq_offsets,
        "layer_ids": trace.layer_ids,
        "num_experts": np.int64(trace.num_experts),
        "top_k": np.int64(trace.top_k),
    }
    for name in ("step", "phase", "token_ids"):
        if getattr(trace, name) is not None:
            fields[name] = getattr(trace, name)
    if trace.model_id is not None:
        fields["model_id"] = np.str_(trace.model_id)
    with whole_file(path) as file:
        np.savez_compressed(file, **fields)
