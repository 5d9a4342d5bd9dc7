"""Reading config.json and generation_config.json: types, bounds, names, both styles of rope."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.errors import CheckpointError
from moe_serve.layers.rope import RopeSpec
from moe_serve.models.hf_config import GenerationDefaults, HFConfig, read_generation_defaults

LENGTH = {"max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(**fields: Any) -> HFConfig:
    return HFConfig(fields, Path("m/config.json"))


def test_reads_the_shared_models(shared_data: Path) -> None:
    demo = HFConfig.read(shared_data / "models" / "demo-moe")
    assert demo.integer("num_experts", low=1) == 32
    assert demo.dtype == torch.bfloat16
    assert demo.rope() == RopeSpec(theta=10000.0)
    assert read_generation_defaults(demo.path.parent) == GenerationDefaults(
        eos_token_ids=frozenset({0}), temperature=0.7, top_p=0.95
    )
    stories = read_generation_defaults(shared_data / "models" / "stories260k")
    assert stories == GenerationDefaults(eos_token_ids=frozenset({2}))


def test_first_name_that_is_present_is_read() -> None:
    fields = config(num_local_experts=8, num_experts=None)
    assert fields.integer("num_experts", "num_local_experts") == 8
    assert (
        config(num_local_experts=8, num_experts=4).integer("num_experts", "num_local_experts") == 4
    )


def test_null_is_absent_and_gives_the_default() -> None:
    fields = config(a=None)
    assert fields.optional_integer("a") is None
    assert fields.optional_number("a") is None
    assert fields.optional_string("a") is None
    assert fields.integer("a", default=3) == 3
    assert fields.number("a", default=0.5) == 0.5
    assert fields.boolean("a", default=True) is True
    assert fields.string("a", default="x") == "x"
    assert fields.integers("a", default=(1,)) == (1,)
    assert fields.layer_types(2, ("full_attention",)) is None
    assert not fields.has("a")
    assert fields.section("a") is None


def test_bounds_are_inclusive() -> None:
    fields = config(low=1, high=8)
    assert fields.integer("low", low=1, high=8) == 1
    assert fields.integer("high", low=1, high=8) == 8
    assert config(rate=1).number("rate", low=0.0, high=1.0) == 1.0


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda c: c.integer("absent"), ("has no absent",)),
        (lambda c: c.integer("absent", "gone"), ("has no absent (nor gone)",)),
        (lambda c: c.boolean("absent"), ("has no absent",)),
        (lambda c: c.integer("nine", low=1, high=8), ("nine is 9", "from 1 to 8")),
        (lambda c: c.integer("nine", low=10), ("nine is 9", "from 10")),
        (lambda c: c.integer("half"), ("half is 0.5", "integer")),
        (lambda c: c.integer("yes"), ("yes is True", "integer")),
        (lambda c: c.number("yes"), ("yes is True", "number")),
        (lambda c: c.number("half", high=0.25), ("half is 0.5", "0.25")),
        (lambda c: c.boolean("nine"), ("nine is 9", "true or false")),
        (lambda c: c.string("nine"), ("nine is 9", "string")),
        (lambda c: c.string("text", choices=("silu", "gelu")), ("'relu'", "silu, gelu")),
        (lambda c: c.integers("nine"), ("nine is 9", "list")),
        (lambda c: c.integers("list", high=2), ("list[2] is 3", "from 0 to 2")),
        (lambda c: c.layer_types(2, ("a",)), ("layer_types has 1 entries", "2 layers")),
        (lambda c: c.layer_types(1, ("a",)), ("layer_types[0] is 'b'", "one of a")),
        (lambda c: c.section("nine"), ("nine is 9", "object")),
        (lambda c: c.section("inner").integer("x"), ("inner.x is 'y'",)),
        (lambda c: c.dtype, ("torch_dtype is 'int8'", "bfloat16")),
        (lambda c: c.string("long"), ("...",)),
    ],
)
def test_error_names_file_field_value_and_limit(
    read: Callable[[HFConfig], object], words: tuple[str, ...]
) -> None:
    fields = config(
        nine=9, half=0.5, yes=True, text="relu", list=[1, 2, 3], layer_types=["b"],
        inner={"x": "y"}, torch_dtype="int8", long=["z" * 10_000] * 100,
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        read(fields)
    message = str(caught.value)
    assert message.startswith("m/config.json: ")
    assert len(message) < 1000
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"torch_dtype": "torch.float32"}, torch.float32),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_dtype(fields: dict[str, Any], dtype: torch.dtype) -> None:
    assert config(**fields).dtype == dtype


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, RopeSpec(theta=5000.0)),
        ({"rope_theta": 1000000}, RopeSpec(theta=1e6)),
        ({"rope_theta": 7.0, "rope_scaling": None}, RopeSpec(theta=7.0)),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, RopeSpec(theta=7.0)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, RopeSpec(theta=7.0)),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0}, RopeSpec(theta=7.0)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            RopeSpec(theta=5000.0, kind="linear", options={"factor": 2.0}),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, **LENGTH},
            RopeSpec(
                theta=5000.0,
                kind="llama3",
                options={**LLAMA3, "original_max_position_embeddings": 4096.0},
            ),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0,
                                 "original_max_position_embeddings": 1024}, **LENGTH},
            RopeSpec(
                theta=5000.0,
                kind="yarn",
                options={"factor": 4.0, "mscale": 0.0, "truncate": 1.0,
                         "original_max_position_embeddings": 1024.0},
            ),
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 1024}, **LENGTH},
            RopeSpec(
                theta=5000.0,
                kind="yarn",
                options={"factor": 4.0, "truncate": 1.0,
                         "original_max_position_embeddings": 1024.0},
            ),
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"},
                                 "sliding_attention": {"rope_theta": 7.0},
                                 "rope_theta": 7.0}},
            RopeSpec(theta=7.0),
        ),
    ],
)  # fmt: skip
def test_rope_of_either_style(fields: dict[str, Any], expected: RopeSpec) -> None:
    assert config(**fields).rope(default_theta=5000.0) == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_theta": 0}, ("rope_theta is 0",)),
        ({"rope_theta": "x"}, ("rope_theta is 'x'",)),
        ({"rope_parameters": []}, ("rope_parameters is []", "object")),
        ({"rope_parameters": {"rope_type": "longrope"}}, ("'longrope'", "yarn")),
        ({"rope_parameters": {"rope_type": 3}}, ("rope_parameters.rope_type is 3",)),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ("rope_scaling.factor is 0",)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, ("max_position_embeddings",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor is 0.5", "only 1")),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, ("rope_parameters.partial",)),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, **LENGTH},
            ("high_freq_factor is 1", "low_freq_factor"),
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6},
                                 "sliding_attention": {"rope_theta": 1e4}}},
            ("rope_parameters.full_attention", "1e+06", "rope_parameters.sliding_attention"),
        ),
        (
            {"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": {"type": "yarn"}, **LENGTH},
            ("rope_parameters", "rope_scaling", "yarn"),
        ),
    ],
)  # fmt: skip
def test_rope_that_cannot_be_is_refused(fields: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        config(**fields).rope()
    for word in words:
        assert word in str(caught.value)


def generation(
    folder: Path, fields: dict[str, Any] | None, **config_fields: Any
) -> GenerationDefaults:
    (folder / "config.json").write_text(json.dumps(config_fields))
    if fields is not None:
        (folder / "generation_config.json").write_text(json.dumps(fields))
    return read_generation_defaults(folder)


def test_generation_defaults_are_read(tmp_path: Path) -> None:
    fields = {
        "eos_token_id": [5, 6], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20,
        "min_p": 0.1, "repetition_penalty": 1.05, "max_new_tokens": 512,
    }  # fmt: skip
    assert generation(tmp_path, fields, eos_token_id=1) == GenerationDefaults(
        eos_token_ids=frozenset({5, 6}),
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        repetition_penalty=1.05,
        max_new_tokens=512,
    )


def test_do_sample_false_is_greedy(tmp_path: Path) -> None:
    assert generation(tmp_path, {"do_sample": False, "temperature": 0.6}).temperature == 0.0


@pytest.mark.parametrize("fields", [None, {}, {"eos_token_id": None}])
def test_eos_falls_back_to_config(tmp_path: Path, fields: dict[str, Any] | None) -> None:
    assert generation(tmp_path, fields, eos_token_id=[3, 4]).eos_token_ids == {3, 4}


def test_no_eos_anywhere_is_none(tmp_path: Path) -> None:
    assert generation(tmp_path, None) == GenerationDefaults()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, ("temperature is -1", "from 0")),
        ({"top_p": 1.5}, ("top_p is 1.5", "to 1")),
        ({"top_k": 2.5}, ("top_k is 2.5", "integer")),
        ({"eos_token_id": "0"}, ("eos_token_id is '0'", "integer")),
        ({"eos_token_id": [0, -1]}, ("eos_token_id[1] is -1",)),
        ({"do_sample": 1}, ("do_sample is 1", "true or false")),
    ],
)
def test_bad_generation_config_is_refused(
    tmp_path: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as caught:
        generation(tmp_path, fields)
    for word in words:
        assert word in str(caught.value)
