"""llama.cpp, through the C API of llama-cpp-python: all sequences in one batch, BF16 weights.

Its high-level class runs one sequence at a time, which would hide what it can do. Settings: as many
threads as there are cores; every sequence with a cache of its own (`kv_unified` off), as no token
then attends over the others' cells; the rest as llama.cpp sets it, flash attention included.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found, unused-ignore]  # has its own environment
import numpy as np

from benchmarks.peers.gguf_file import gguf_file
from benchmarks.peers.systems.base import System

N_BATCH = 2048
# (token id, position, sequence, whether its logits are wanted)
Entry = tuple[int, int, int, bool]


class _Context:
    """A cache for a number of sequences of a length, and the decoding of token batches on it."""

    def __init__(self, model: Any, num_sequences: int, length: int, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_sequences * -(-length // 256) * 256
        params.n_seq_max = num_sequences
        params.n_batch = N_BATCH
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {num_sequences} x {length} tokens")
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        """Read all prompts, then give every sequence a token a step."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        outputs: list[list[int]] = [[] for _ in prompts]
        for step in range(output_tokens):
            for start in range(0, len(entries), N_BATCH):
                for sequence, token in self._decode(entries[start : start + N_BATCH]):
                    outputs[sequence].append(token)
            entries = [
                (tokens[-1], len(prompts[sequence]) + step, sequence, True)
                for sequence, tokens in enumerate(outputs)
            ]
        return outputs

    def _decode(self, entries: Sequence[Entry]) -> list[tuple[int, int]]:
        """Run one batch; return (sequence, likeliest next token) where logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence, is_wanted) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = is_wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status} for {len(entries)} tokens")
        return [
            (sequence, self._likeliest(index))
            for index, (_, _, sequence, is_wanted) in enumerate(entries)
            if is_wanted
        ]

    def _likeliest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


class LlamaCpp:
    """The model, and a context for each size of job, made at its unmeasured first run."""

    numerics_id: str | None = None

    def __init__(self, model: Path, threads: int | None) -> None:
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._threads = threads or len(os.sched_getaffinity(0))
        llama_cpp.llama_backend_init()
        path = gguf_file(model)
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise RuntimeError(
                f"llama.cpp did not load {path.name}; remove it to have it rewritten"
            )
        self._contexts: dict[tuple[int, int], _Context] = {}

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[list[int]]:
        size = len(prompts), len(prompts[0]) + output_tokens
        if size not in self._contexts:
            self._contexts[size] = _Context(self._model, *size, self._threads)
        return self._contexts[size].generate(prompts, output_tokens)


def build(model: Path, threads: int | None) -> System:
    """Load the checkpoint in `model`; threads None: all cores."""
    return LlamaCpp(model, threads)
