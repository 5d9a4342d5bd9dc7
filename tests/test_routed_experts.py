"""Requests that ask for their tokens' experts are told what a trace records, in any batch."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve.engine.engine import Engine
from moe_serve.errors import RequestError
from moe_serve.experts.recorder import Array
from moe_serve.experts.trace import read_trace
from moe_serve.llm import LLM
from moe_serve.types import ForwardBatch, Request, RequestOutput, SamplingParams
from tests.models import tiny
from tests.offloaded import HALF, LEAST, NUM_LAYERS, TOP_K, make, prompts

COUNT = 6
ASKED = SamplingParams(
    max_tokens=14, temperature=0.9, seed=3, ignore_eos=True, return_routed_experts=True
)
SILENT = replace(ASKED, return_routed_experts=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def asking(store: Path, **options: Any) -> LLM:
    return make(store, enable_return_routed_experts=True, **options)


def routed(output: RequestOutput, index: int = 0) -> Array:
    """Return an output's experts, of as many tokens as were run."""
    found = output.outputs[index].routed_experts
    assert found is not None
    num_tokens = len(output.prompt_token_ids) + len(output.outputs[index].token_ids) - 1
    assert (found.first, found.shape) == (0, (num_tokens, NUM_LAYERS, TOP_K))
    return found.array()


@functools.cache
def recorded(store: Path, kernels: str = "auto") -> tuple[list[Array], list[tuple[int, ...]]]:
    """Return what a recorder sees of each prompt run alone, and the tokens."""
    path = store / f"{kernels}.npz"
    with make(
        store, kernels=kernels, record_trace=str(path), enable_prefix_caching=False
    ) as llm:  # fmt: skip
        outputs = [llm.generate([prompt], SILENT, use_tqdm=False)[0] for prompt in prompts(COUNT)]
    assert all(output.outputs[0].routed_experts is None for output in outputs)
    trace = read_trace(path)
    ids = [
        trace.ids[begin:end]
        for begin, end in zip(trace.seq_offsets, trace.seq_offsets[1:], strict=False)
    ]
    return ids, [output.outputs[0].token_ids for output in outputs]


OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {},
    "layer by layer": {"fused": False},
    "cached": {"expert_cache_slots": LEAST},
    "cached, layer by layer": {"expert_cache_slots": HALF, "fused": False},
    "guessing": {"expert_cache_slots": HALF, "prefetch": "on"},
    "behind a link": {"expert_cache_slots": HALF, "emulate_link": 5.0},
    "chunks": {"max_prefill_chunk": 5, "max_num_batched_tokens": 11},
    "one at a time": {"max_num_seqs": 1},
    "preempted": {
        "num_kv_blocks": 18, "block_size": 4, "max_model_len": 60, "admission_horizon": 0,
    },
    "preempted, no prefixes": {
        "num_kv_blocks": 18, "block_size": 4, "max_model_len": 60, "admission_horizon": 0,
        "enable_prefix_caching": False,
    },
    "reference": {"kernels": "reference"},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_told_is_what_a_trace_records(store: Path, name: str) -> None:
    options = OPTIONS[name]
    ids, tokens = recorded(store, options.get("kernels", "auto"))
    with asking(store, **options) as llm:
        for turn in range(2):  # again, with whatever the first run left cached
            outputs = llm.generate(prompts(COUNT), ASKED, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == tokens, turn
            for output, want in zip(outputs, ids, strict=True):
                np.testing.assert_array_equal(routed(output), want)
        stats = llm.engine.stats()
        if "preempted" in name:
            assert stats.num_preemptions > 0


def test_others_blocks_are_not_taken_over_but_its_own_may_be_by_others(store: Path) -> None:
    prompt = list(range(100, 150))
    with asking(store) as llm:
        llm.generate([prompt], SILENT, use_tqdm=False)
        asked = llm.generate([prompt], ASKED, use_tqdm=False)[0]
        assert asked.metrics.num_cached_tokens == 0
        assert len(routed(asked)) == 63
        plain = llm.generate([prompt], SILENT, use_tqdm=False)[0]
        assert plain.metrics.num_cached_tokens == 48
        assert plain.outputs[0].routed_experts is None
    with asking(store) as llm:
        llm.generate([prompt], ASKED, use_tqdm=False)
        plain = llm.generate([prompt], SILENT, use_tqdm=False)[0]
        assert plain.metrics.num_cached_tokens == 48


@pytest.mark.parametrize("max_num_seqs", [8, 2])  # of 2, forks wait, and are computed anew
def test_outputs_of_one_prompt_share_its_part(store: Path, max_num_seqs: int) -> None:
    prompt = prompts(COUNT)[-1]
    with asking(store, max_num_seqs=max_num_seqs, max_prefill_chunk=7) as llm:
        forked = llm.generate([prompt], replace(ASKED, n=3), use_tqdm=False)[0]
        singles = [
            llm.generate([prompt], replace(ASKED, seed=3 + index), use_tqdm=False)[0]
            for index in range(3)
        ]
    for index, single in enumerate(singles):
        assert forked.outputs[index].token_ids == single.outputs[0].token_ids
        np.testing.assert_array_equal(routed(forked, index), routed(single))


def test_an_output_that_a_stop_string_ends_has_all_tokens_that_ran(store: Path) -> None:
    greedy = replace(ASKED, temperature=0.0)
    with asking(store) as llm:
        whole = llm.generate([prompts(1)[0]], greedy, use_tqdm=False)[0]
        text = whole.outputs[0].text
        cut = llm.generate(
            [prompts(1)[0]], replace(greedy, stop=[text[len(text) // 2 :][:4]]), use_tqdm=False
        )[0]
    assert cut.outputs[0].finish_reason == "stop"
    assert 0 < len(cut.outputs[0].token_ids) < len(whole.outputs[0].token_ids)
    np.testing.assert_array_equal(routed(cut), routed(whole)[: len(routed(cut))])


def test_a_stream_tells_more_with_every_token(store: Path) -> None:
    with asking(store) as llm:
        seen = [routed(output) for output in llm.stream([5, 6, 7, 8], ASKED)]
    assert [len(one) for one in seen] == list(range(4, 18))
    for one in seen:
        np.testing.assert_array_equal(one, seen[-1][: len(one)])


def test_steps_tell_what_ran_in_them_and_no_more(store: Path) -> None:
    """However long prompts are and however many outputs, what a step tells is bounded."""
    sampling = replace(ASKED, n=4, max_tokens=3)
    with asking(store, max_num_batched_tokens=8, max_prefill_chunk=5) as llm:
        for number in range(3):
            prompt = tuple(range(10 * number + 5, 10 * number + 45))
            llm.engine.add(Request(request_id=f"r{number}", prompt_ids=prompt, sampling=sampling))
        num_rows = 0
        while llm.engine.has_unfinished:
            told = [output.routed_experts for output in llm.engine.step()]
            rows = [routed.shape[0] for routed in told if routed is not None]
            assert sum(rows) <= 8
            num_rows += sum(rows)
    assert num_rows == 3 * (40 + 4 * 2)


def test_a_stream_says_nothing_before_the_first_token(store: Path) -> None:
    with asking(store, max_prefill_chunk=5) as llm:
        outputs = list(llm.stream(list(range(5, 25)), ASKED))
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, 15))
    assert len(routed(outputs[0])) == 20


def test_who_asks_and_who_does_not_run_together(store: Path) -> None:
    ids, tokens = recorded(store)
    params = [ASKED if index % 2 else SILENT for index in range(COUNT)]
    with asking(store) as llm:
        outputs = llm.generate(prompts(COUNT), params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == tokens
    for index, output in enumerate(outputs):
        if index % 2:
            np.testing.assert_array_equal(routed(output), ids[index])
        else:
            assert output.outputs[0].routed_experts is None


def test_nothing_is_noted_when_nobody_asks(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(store) as llm:
        assert isinstance(llm.engine, Engine)
        experts = llm.engine.runner.model.experts
        noted: list[bool] = []
        step = experts.step

        def watched(batch: ForwardBatch, is_noted: bool) -> Any:
            noted.append(is_noted)
            return step(batch, is_noted)

        monkeypatch.setattr(experts, "step", watched)
        llm.generate([[5, 6]], SILENT, use_tqdm=False)
        assert noted == [False] * 14
        llm.generate([[5, 6]], ASKED, use_tqdm=False)
        assert noted == [False] * 14 + [True] * 14


def test_it_is_refused_where_it_is_not_enabled(store: Path) -> None:
    with make(store) as llm, pytest.raises(RequestError, match="enable_return_routed_experts"):
        llm.generate([[5]], ASKED, use_tqdm=False)


def test_a_dense_model_refuses(tmp_path: Path) -> None:
    tiny.save_checkpoint(tmp_path, "qwen3")
    with (
        LLM(str(tmp_path), enable_return_routed_experts=True, num_kv_blocks=8) as llm,
        pytest.raises(RequestError, match="dense"),
    ):
        llm.generate([[5]], ASKED, use_tqdm=False)
