"""Options that cannot be are refused before weights are read; dtypes resolve as documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.config import EngineConfig
from moe_serve.engine import build
from moe_serve.errors import CapacityError, ConfigError
from tests.models.bad_checkpoints import CONFIG, write_checkpoint


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any reading or making of weights, or of a block pool, fail the test."""

    def fail(*_args: object, **_kwargs: object) -> None:
        pytest.fail("made before it was known to fit")

    for name in ("load_weights", "dummy_weights", "Decoder", "KVCacheManager"):
        monkeypatch.setattr(build, name, fail)


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
