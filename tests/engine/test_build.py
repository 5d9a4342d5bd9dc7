"""Options that cannot be are refused before weights are read; dtypes resolve as documented."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_serve.config import EngineConfig
from moe_serve.engine import build, expert_parts
from moe_serve.errors import CapacityError, ConfigError
from moe_serve.kernels.native import loader
from moe_serve.layers.attention import LayerCache
from moe_serve.models.decoder import Decoder
from moe_serve.types import ForwardBatch, Request, SamplingParams
from tests.kernels.implementations import EACH_FOR_MODELS, EACH_NATIVE, kernels
from tests.models.bad_checkpoints import CONFIG, write_checkpoint


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any reading or making of weights, or of a block pool, fail the test."""

    def fail(*_args: object, **_kwargs: object) -> None:
        pytest.fail("made before it was known to fit")

    for module, name in (
        (expert_parts, "load_weights"), (expert_parts, "dummy_weights"),
        (expert_parts, "ExpertWeights"), (expert_parts, "open_or_pack"),
        (build, "Decoder"), (build, "KVCacheManager"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, fail)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this installation have no native library."""
    monkeypatch.setattr(loader, "built_path", lambda: None)
    loader.open_library.cache_clear()
    yield
    loader.open_library.cache_clear()


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        (
            {},
            {"num_kv_blocks": 2**31 - 1},
            "2147483647 KV blocks of 16 tokens need 8933531975680 bytes",
        ),
        ({}, {"kv_cache_gb": 2**20}, "KV blocks of 16 tokens need"),
        ({"max_position_embeddings": 2**31 - 1}, {}, "rotary table"),
    ],
    ids=["blocks", "gib", "context"],
)
def test_what_cannot_fit_is_refused_before_weights_are_read(
    changes: dict[str, object],
    options: dict[str, object],
    says: str,
    load_format: str,
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    config = EngineConfig.from_options({**options, "load_format": load_format})
    with pytest.raises(CapacityError, match=says):
        build.build_engine(config, tmp_path)


@pytest.mark.usefixtures("unread")
def test_a_context_beyond_the_model_s_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="max_model_len is 65, but the model's context is 64"):
        build.build_engine(EngineConfig.from_options({"max_model_len": 65}), tmp_path)


@pytest.mark.parametrize(
    ("option", "checkpoint", "expected"),
    [
        ("auto", "float32", "fp32"),
        ("auto", "bfloat16", "bf16"),
        ("auto", "float16", "bf16"),
        ("float32", "float16", "fp32"),
        ("bfloat16", "float32", "bf16"),
    ],
)
def test_dtype(
    option: str,
    checkpoint: str,
    expected: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "dtype": checkpoint}))
    config = EngineConfig.from_options(
        {"dtype": option, "load_format": "dummy", "num_kv_blocks": 4}
    )
    engine = build.build_engine(config, tmp_path)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[expected]
    assert engine.numerics_id.endswith(f"-{str(dtype).removeprefix('torch.')}")
    assert ("runs in bfloat16" in caplog.text) == (option == "auto" and checkpoint == "float16")


@EACH_FOR_MODELS
def test_the_kernels_asked_for_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    wanted = kernels(name)
    config = EngineConfig.from_options(
        {
            "kernels": wanted.name,
            "isa": wanted.isa or "auto",
            "load_format": "dummy",
            "num_kv_blocks": 4,
        }
    )
    engine = build.build_engine(config, tmp_path)
    assert engine.numerics_id == f"{wanted.numerics_id}-float32"


@pytest.mark.usefixtures("unread")
def test_an_instruction_set_of_the_reference_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = EngineConfig.from_options({"kernels": "reference", "isa": "plain"})
    with pytest.raises(ConfigError, match="isa is 'plain', but the reference kernels have none"):
        build.build_engine(config, tmp_path)


@pytest.mark.parametrize("options", [{"kernels": "cpu"}, {"isa": "plain"}], ids=str)
@pytest.mark.usefixtures("unread", "without_library")
def test_native_kernels_that_are_not_built_are_refused(
    options: dict[str, str], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="the native library is not built; install a C"):
        build.build_engine(EngineConfig.from_options(options), tmp_path)


@pytest.mark.usefixtures("without_library")
def test_without_a_library_the_reference_runs_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    options = {"load_format": "dummy", "num_kv_blocks": 4}
    engine = build.build_engine(EngineConfig.from_options(options), tmp_path)
    assert engine.numerics_id.startswith("reference-")
    (message,) = caplog.messages
    assert "slow kernels" in message
    assert "the native library is not built" in message


@EACH_NATIVE
@pytest.mark.parametrize("fused", [True, False])
def test_fused_or_not_is_what_was_asked_for(
    name: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    calls: list[ForwardBatch] = []
    layer_by_layer = Decoder.forward

    def forward(model: Decoder, batch: ForwardBatch, caches: list[LayerCache]) -> Tensor:
        calls.append(batch)
        return layer_by_layer(model, batch, caches)

    monkeypatch.setattr(Decoder, "forward", forward)
    options = {
        "kernels": "cpu",
        "isa": kernels(name).isa,
        "fused": fused,
        "load_format": "dummy",
        "num_kv_blocks": 4,
    }
    engine = build.build_engine(EngineConfig.from_options(options), tmp_path)
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    engine.add(Request(request_id="a", prompt_ids=(1, 2, 3), sampling=sampling))
    engine.step()
    assert bool(calls) != fused
