"""Broken model folders: one clear error each, and nothing allocated that a header rules out."""

from __future__ import annotations

import json
import struct
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_serve.errors import CheckpointError, MoeServeError
from moe_serve.models.checkpoint import load_weights
from moe_serve.models.hf_config import HFConfig, read_generation_defaults
from moe_serve.models.registry import read_spec
from moe_serve.models.safetensors_file import read_header
from tests.models.bad_checkpoints import BAD_CHECKPOINTS, CONFIG, BadCheckpoint, write_checkpoint


def load(folder: Path) -> dict[str, Tensor]:
    spec = read_spec(HFConfig.read(folder))
    return load_weights(folder, spec, torch.float32)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "two-files"])
def test_the_checkpoint_that_is_broken_below_is_sound(tmp_path: Path, is_sharded: bool) -> None:
    write_checkpoint(tmp_path, is_sharded=is_sharded)
    assert load(tmp_path)["norm"].shape == (CONFIG["hidden_size"],)


@pytest.mark.parametrize("bad", BAD_CHECKPOINTS, ids=lambda bad: bad.name)
def test_error_names_what_is_wrong(
    bad: BadCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, is_sharded=bad.is_sharded)
    bad.break_it(folder)
    num_allocated = 0
    allocate = torch.empty

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal num_allocated
        num_allocated += 1
        return allocate(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", counted)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message
    for word in bad.words:
        assert word in message
    assert (num_allocated > 0) == bad.allocates


def test_first_ten_of_many_problems_are_listed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(CheckpointError, match=r"(?s)\d+ problems:.*and \d+ more") as caught:
        load(tmp_path)
    assert len(str(caught.value).splitlines()) == 12


SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**39, 10**60])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["default", "yarn", "llama3", "linear", "dynamic", "bfloat16", "1"])
)
KEYS = st.text(max_size=3) | st.sampled_from(
    ["rope_type", "rope_theta", "factor", "full_attention", "original_max_position_embeddings"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*CONFIG, "rope_parameters", "rope_scaling", "layer_types", "torch_dtype", "sliding_window"]
)
FUZZ = settings(max_examples=200, deadline=None)


@FUZZ
@given(changes=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3))
def test_any_config_is_a_spec_or_one_of_our_errors(changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        with suppress(MoeServeError):
            config = HFConfig.read(folder)
            for part in (config.rope, lambda: config.dtype, lambda: config.layer_types(2, ("a",))):
                with suppress(MoeServeError):
                    part()
            read_spec(config)


@FUZZ
@given(
    fields=st.dictionaries(
        st.sampled_from(
            [
                "eos_token_id",
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "do_sample",
                "repetition_penalty",
                "max_new_tokens",
            ]
        ),
        VALUES,
        max_size=4,
    )
)
def test_any_generation_config_is_read_or_one_of_our_errors(fields: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "generation_config.json").write_text(json.dumps(fields))
        with suppress(CheckpointError):
            read_generation_defaults(folder)


@FUZZ
@given(
    content=st.binary(max_size=64)
    | st.text(max_size=64).map(str.encode)
    | st.text(alphabet='{}[]",:0189.eE-NaInfity \\u', max_size=40).map(str.encode)
)
def test_any_bytes_as_config_are_read_or_one_of_our_errors(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_bytes(content)
        with suppress(CheckpointError):
            HFConfig.read(Path(name)).rope()


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F6_E2M3", "X"]) | VALUES,
        "shape": st.lists(st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 10**39])) | VALUES,
        "data_offsets": st.lists(st.integers(-1, 70), min_size=1, max_size=3) | VALUES,
        "more": VALUES,
    },
)


@FUZZ
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRIES | VALUES),
    data=st.binary(max_size=64),
    length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 64),
)
def test_any_header_is_consistent_or_one_of_our_errors(
    header: dict[str, Any], data: bytes, length: int | None
) -> None:
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        with suppress(CheckpointError):
            found = read_header(path)
            assert sum(info.num_bytes for info in found.tensors.values()) <= path.stat().st_size
