"""Notes of which experts each step used, and a recorder that makes a trace of them.

Memory is bounded: what was recorded lies in temporary files until the trace is written.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from moe_serve.errors import TraceError
from moe_serve.experts.output_file import output_path
from moe_serve.experts.trace import DECODE, PREFILL, Trace, write_trace
from moe_serve.types import ForwardBatch, Routing

Array = np.ndarray[Any, Any]


class StepNotes:
    """One step's routing, by the model's layers.

    ids: int64, weights: float32, both [num_layers, num_tokens, top_k]; rows of layers without
    experts are never written.
    """

    def __init__(self, num_layers: int, num_tokens: int, top_k: int) -> None:
        self.ids = torch.empty(num_layers, num_tokens, top_k, dtype=torch.int64)
        self.weights = torch.empty(num_layers, num_tokens, top_k, dtype=torch.float32)

    def note(self, layer: int, routing: Routing) -> None:
        self.ids[layer] = routing.expert_ids
        self.weights[layer] = routing.weights


class RoutingRecorder:
    """Records steps, and at its close writes them as a trace, sequence by sequence.

    A token that a preempted sequence computes again is recorded again, at its step.
    """

    def __init__(
        self, path: Path, layers: list[int], num_experts: int, top_k: int, model_id: str
    ) -> None:
        """path: the .npz to write; layers: the model's layers that have experts.

        Raises TraceError where nothing can be written.
        """
        self.path = output_path(path)
        self._layers = layers
        self._rows = torch.tensor(layers)
        self._num_experts = num_experts
        self._top_k = top_k
        self._model_id = model_id
        self._dtype = np.uint8 if num_experts <= 256 else np.uint16
        try:
            self._files: dict[str, BinaryIO] = {
                name: tempfile.TemporaryFile(buffering=0, dir=self.path.parent)  # noqa: SIM115 - until close
                for name in ("ids", "weights", "tokens")
            }
        except OSError as error:
            raise TraceError(f"{path}: cannot be written ({error.strerror})") from error
        self.num_tokens = 0

    def add(self, step: int, batch: ForwardBatch, notes: StepNotes) -> None:
        """Record one step. Raises TraceError where it cannot be written, naming the file."""
        ids = notes.ids[self._rows].transpose(0, 1).contiguous().numpy()
        weights = notes.weights[self._rows].transpose(0, 1).contiguous().numpy()
        lens = torch.tensor(batch.query_lens)
        prompts = torch.tensor(batch.prompt_lens).repeat_interleave(lens)
        positions = batch.positions.cpu()
        columns = (
            batch.sequence_ids.cpu(),
            positions,
            torch.full_like(positions, step),
            torch.where(positions < prompts, PREFILL, DECODE),
            batch.token_ids.cpu(),
        )
        tokens = torch.stack([column.long() for column in columns], 1).numpy()
        parts = {
            "ids": ids.astype(self._dtype).tobytes(),
            "weights": weights.astype(np.float16).tobytes(),
            "tokens": tokens.tobytes(),
        }
        ends = {name: file.tell() for name, file in self._files.items()}
        try:
            for name, data in parts.items():
                _write_all(self._files[name], data)
        except OSError as error:
            for name, end in ends.items():  # all three still hold the same tokens
                self._files[name].seek(end)
                self._files[name].truncate()
            raise TraceError(f"{self.path}: cannot be written ({error.strerror})") from error
        self.num_tokens += batch.num_tokens

    def close(self) -> Trace | None:
        """Write the trace and return it; None the second time."""
        if not self._files:
            return None
        shape = (self.num_tokens, len(self._layers), self._top_k)
        tokens = self._read("tokens", np.int64, (self.num_tokens, 5))
        order = np.lexsort((tokens[:, 2], tokens[:, 1], tokens[:, 0]))
        tokens = tokens[order]
        starts = np.flatnonzero(np.diff(tokens[:, 0], prepend=-1))
        trace = Trace(
            name=self.path.stem,
            ids=self._read("ids", self._dtype, shape)[order],
            weights=self._read("weights", np.float16, shape)[order],
            seq_offsets=np.append(starts, self.num_tokens).astype(np.int64),
            layer_ids=np.array(self._layers, np.int64),
            num_experts=self._num_experts,
            top_k=self._top_k,
            step=tokens[:, 2].astype(np.int32),
            phase=tokens[:, 3].astype(np.uint8),
            token_ids=tokens[:, 4].astype(np.int32),
            model_id=self._model_id,
        )
        for file in self._files.values():
            file.close()
        self._files.clear()
        write_trace(self.path, trace)
        return trace

    def _read(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Array:
        file = self._files[name]
        file.seek(0)
        return np.fromfile(file, dtype=dtype).reshape(shape)


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of it to an unbuffered file. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
