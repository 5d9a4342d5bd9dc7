"""Which model types there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_serve import plugin
from moe_serve.errors import CheckpointError, ConfigError
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import model_types, read_spec


def test_every_listed_type_can_be_built() -> None:
    assert len(model_types()) >= 8
    for name in model_types():
        assert callable(plugin.load("moe_serve.models", name).build)


def _read(folder: Path, config: dict[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    read_spec(HFConfig.read(folder))


def test_an_unknown_type_is_a_usage_error_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, {"model_type": "qwen3_mo"})
    assert "'qwen3_mo' is not supported; did you mean 'qwen3_moe'?" in str(caught.value)
    assert "mixtral" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["checkpoint", "decoder", "spec", "registry", "base"])
def test_machinery_is_no_type(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        _read(tmp_path, {"model_type": name})


def test_a_config_that_would_never_end_is_refused(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral", "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8,
        "num_hidden_layers": 4096, "num_local_experts": 65536, "num_experts_per_tok": 2,
        "intermediate_size": 8, "max_position_embeddings": 8,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="num_experts"):
        _read(tmp_path, config)
