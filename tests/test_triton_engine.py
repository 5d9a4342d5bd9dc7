"""The engine on a GPU's kernels, interpreted: graphs, transfers and batches change no bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.config import EngineConfig
from moe_serve.engine.build import build_engine
from moe_serve.engine.engine import Engine
from moe_serve.types import Request, SamplingParams
from tests.models import tiny

pytest.importorskip("triton")
# what is missing gives numbers of no meaning, whatever was in memory, and NumPy warns of some
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIONS = {"kernels": "triton", "max_num_seqs": 4, "num_kv_blocks": 16, "seed": 3}
# two layers, so that an expert can be missing before and behind another router
SMALLER = {"num_hidden_layers": 2, "mlp_only_layers": []}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "model"
    tiny.save_checkpoint(folder, "qwen3_moe", SMALLER)
    return folder


def _requests() -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    requests = []
    for number, length in enumerate((9, 2, 5)):
        prompt = torch.randint(0, tiny.VOCAB_SIZE, (length,), generator=generator).tolist()
        sampling = SamplingParams(
            max_tokens=3, temperature=0.8 * (number % 2), logprobs=2, ignore_eos=True
        )
        requests.append(
            Request(request_id=f"r{number}", prompt_ids=tuple(prompt), sampling=sampling, seed=9)
        )
    return requests


Told = dict[str, list[Any]]


def _run(engine: Engine, requests: list[Request]) -> Told:
    found: Told = {}
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None, output.error
            found.setdefault(output.request_id, []).append((output.token_ids, output.logprobs))
    return found


def _engine(model: Path, **options: object) -> Engine:
    return build_engine(EngineConfig.from_options({**OPTIONS, **options}), model)


@pytest.fixture(scope="module")
def alone(model: Path) -> Told:
    """What each request gives by itself, layer by layer, all experts resident."""
    engine = _engine(model, fused=False)
    found: Told = {}
    for request in _requests():
        found |= _run(engine, [request])
    engine.close()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expert_cache_slots": 3},
        {
            "expert_cache_slots": 3,
            "expert_stream_slots": 2,
            "prefetch": "off",
            "fused": False,
        },
        {"expert_cache_slots": 2, "prefetch": "off", "expert_store": "store"},
    ],
    ids=["graphs", "host memory", "layer by layer", "disk"],
)
def test_a_batch_gives_what_each_request_gives_alone(
    options: dict[str, Any], model: Path, alone: Told, tmp_path: Path
) -> None:
    if "expert_store" in options:
        options = options | {"expert_store": str(tmp_path)}
    engine = _engine(model, **options)
    try:
        assert "triton" in engine.numerics_id
        assert _run(engine, _requests()) == alone
        told = engine.stats().experts
        if "expert_cache_slots" in options:
            assert told["total"]["misses"] > 0
            source = "disk_bytes" if "expert_store" in options else "link_bytes"
            assert told["total"][source] > 0
        if "expert_stream_slots" in options:
            assert told["read_ahead"]["used"] > 0
    finally:
        engine.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"expert_cache_slots": 3}, {"expert_cache_slots": 3, "prefetch": "off", "fused": False}],
    ids=["resident", "cache", "layer by layer"],
)
def test_warming_up_leaves_no_trace(options: dict[str, Any], model: Path, alone: Told) -> None:
    engine = _engine(model, **options)
    caches = [part.clone() for c in engine.runner._caches for part in (c.key, c.value)]
    before = engine.stats()
    engine.runner.warm_up(6)
    assert engine.stats() == before
    for old, new in zip(
        caches, [part for c in engine.runner._caches for part in (c.key, c.value)], strict=True
    ):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    request = _requests()[1]
    assert _run(engine, [request]) == {request.request_id: alone[request.request_id]}
    engine.close()


def test_splitting_misses_is_said_to_be_another_mode(
    model: Path, alone: Told, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = _engine(model, expert_cache_slots=2, miss="split", prefetch="off")
    try:
        assert "not exact" in caplog.text
        found = _run(engine, _requests()[:1])
        (name,) = found
        first, want = found[name][0], alone[name][0]
        assert first[0] == want[0]
        assert first[1][0].logprob == pytest.approx(want[1][0].logprob, abs=1e-3)
    finally:
        engine.close()
