"""Read a Hugging Face folder's config.json and generation_config.json, field by field.

Owns how a field is found, typed and bounded, in the old and the new style of writing. Does not know
what a model makes of the fields: that is `models/<model_type>.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from moe_serve.errors import CheckpointError
from moe_serve.layers.rope import RopeSpec
from moe_serve.models import strict_json
from moe_serve.models.strict_json import shown
from moe_serve.types import DTYPES

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MAX_INTEGER = 2**31 - 1

Value = TypeVar("Value")


def require_folder(folder: Path) -> None:
    """Raise CheckpointError unless `folder` is a folder that can be listed and is not empty."""
    try:
        if folder.is_dir():
            if next(folder.iterdir(), None) is None:
                raise CheckpointError(
                    f"{folder}: the model folder is empty; it needs {CONFIG_FILE} and *.safetensors"
                )
            return
        exists = folder.exists()
    except OSError as error:
        raise strict_json.unreadable(folder, error) from error
    if exists:
        raise CheckpointError(
            f"{folder}: is a file; give the folder that holds {CONFIG_FILE} and *.safetensors"
        )
    raise CheckpointError(f"{folder}: there is no such model folder")


@dataclass(frozen=True, slots=True)
class HFConfig:
    """One config.json, or an object within it, and typed ways to read its fields.

    Every accessor takes one or several names, of which the first that is present is read; a field
    that is null counts as absent. What is absent gives `default`, and where that is None the field
    is required. All raise CheckpointError with the file, the field, the value and the limit.

    raw: the fields. path: the file, for messages. prefix: where in the file `raw` is ("" or
    "rope_parameters.").
    """

    raw: dict[str, Any]
    path: Path
    prefix: str = ""

    @classmethod
    def read(cls, folder: Path) -> HFConfig:
        """Read `folder`/config.json."""
        require_folder(folder)
        path = folder / CONFIG_FILE
        if not os.path.lexists(path):
            raise CheckpointError(
                f"{folder}: has no {CONFIG_FILE}; give a folder in Hugging Face's layout"
            )
        return cls(strict_json.read_object(path), path)

    def error(self, name: str, message: str) -> CheckpointError:
        """Return a CheckpointError about field `name`, for the caller to raise."""
        return CheckpointError(f"{self.path}: {self.prefix}{name} {message}")

    def has(self, name: str) -> bool:
        """Return whether field `name` is there and not null."""
        return self.raw.get(name) is not None

    def mentions(self, name: str) -> bool:
        """Return whether field `name` is there, be it null: where null is not the default."""
        return name in self.raw

    def optional_integer(self, *names: str, low: int = 0, high: int = MAX_INTEGER) -> int | None:
        """Return the integer, `low` to `high`, or None if it is absent."""
        name = self._present(names)
        return None if name is None else self._integer(name, self.raw[name], low, high)

    def integer(
        self, *names: str, low: int = 0, high: int = MAX_INTEGER, default: int | None = None
    ) -> int:
        """Return the integer, `low` to `high`."""
        value = self.optional_integer(*names, low=low, high=high)
        return self._required(names, default) if value is None else value

    def optional_number(self, *names: str, low: float = -1e38, high: float = 1e38) -> float | None:
        """Return the number, `low` to `high`, or None if it is absent."""
        name = self._present(names)
        if name is None:
            return None
        value = self.raw[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"is {shown(value)}; it must be a number")
        if not low <= value <= high:
            raise self.error(name, f"is {value}; it must be from {low:g} to {high:g}")
        return float(value)

    def number(
        self, *names: str, low: float = -1e38, high: float = 1e38, default: float | None = None
    ) -> float:
        """Return the number, `low` to `high`."""
        value = self.optional_number(*names, low=low, high=high)
        return self._required(names, default) if value is None else value

    def boolean(self, *names: str, default: bool | None = None) -> bool:
        """Return the boolean."""
        name = self._present(names)
        if name is None:
            return self._required(names, default)
        value = self.raw[name]
        if not isinstance(value, bool):
            raise self.error(name, f"is {shown(value)}; it must be true or false")
        return value

    def optional_string(self, *names: str, choices: Sequence[str] = ()) -> str | None:
        """Return the string, one of `choices` if there are any, or None if it is absent."""
        name = self._present(names)
        if name is None:
            return None
        return self._string(name, self.raw[name], choices)

    def string(self, *names: str, choices: Sequence[str] = (), default: str | None = None) -> str:
        """Return the string, one of `choices` if there are any."""
        value = self.optional_string(*names, choices=choices)
        return self._required(names, default) if value is None else value

    def integers(
        self,
        *names: str,
        low: int = 0,
        high: int = MAX_INTEGER,
        default: tuple[int, ...] | None = None,
    ) -> tuple[int, ...]:
        """Return the list of integers, each `low` to `high`."""
        name = self._present(names)
        if name is None:
            return self._required(names, default)
        items = self._list(name)
        return tuple(self._integer(f"{name}[{i}]", v, low, high) for i, v in enumerate(items))

    def layer_types(self, num_layers: int, choices: Sequence[str]) -> tuple[str, ...] | None:
        """Return layer_types, one of `choices` for each of `num_layers`, or None if absent."""
        name = self._present(("layer_types",))
        if name is None:
            return None
        items = self._list(name)
        if len(items) != num_layers:
            raise self.error(
                name, f"has {len(items)} entries; it must have one for each of {num_layers} layers"
            )
        return tuple(self._string(f"{name}[{i}]", v, choices) for i, v in enumerate(items))

    @property
    def dtype(self) -> torch.dtype:
        """What the checkpoint says it is held in (dtype or torch_dtype); float32 if it does not."""
        name = self._present(("dtype", "torch_dtype"))
        if name is None:
            return torch.float32
        choices = [*DTYPES, *(f"torch.{known}" for known in DTYPES)]
        return DTYPES[self._string(name, self.raw[name], choices).removeprefix("torch.")]

    def section(self, name: str) -> HFConfig | None:
        """Return the object in field `name` as a config of its own, or None if it is absent."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"is {shown(value)}; it must be an object")
        return HFConfig(value, self.path, f"{self.prefix}{name}.")

    def rope(self, default_theta: float = 10000.0) -> RopeSpec:
        """Return the rotary embedding, from rope_theta + rope_scaling or from rope_parameters.

        Where there are several descriptions (both styles, or one for each layer type) they must
        agree: a RopeSpec is of the whole model.
        """
        found = [
            (section.prefix.removesuffix("."), _rope_spec(self, section, default_theta))
            for name in ("rope_parameters", "rope_scaling")
            for section in self._rope_sections(name)
        ]
        if not found:
            return _rope_spec(self, HFConfig({}, self.path, self.prefix), default_theta)
        first_name, first = found[0]
        for name, spec in found[1:]:
            if spec != first:
                raise CheckpointError(
                    f"{self.path}: {first_name} is {_rope_text(first)} but {name} is "
                    f"{_rope_text(spec)}; one rotary embedding for all layers is supported"
                )
        return first

    def refuse_quantised(self) -> None:
        """Raise CheckpointError if the config says that the weights are quantised."""
        section = self.section("quantization_config")
        if section is not None:
            method = section.raw.get("quant_method")
            raise self.error(
                "quantization_config",
                f"says that the weights are quantised (quant_method {shown(method)}); "
                "quantised checkpoints are not supported yet: use the bfloat16 original",
            )

    def _rope_sections(self, name: str) -> list[HFConfig]:
        """List the rope objects in field `name`: itself, or one for each layer type."""
        outer = self.section(name)
        if outer is None:
            return []
        shared = {key: v for key, v in outer.raw.items() if not isinstance(v, dict)}
        nested = [outer.section(key) for key, v in outer.raw.items() if isinstance(v, dict)]
        if not nested:
            return [outer]
        return [HFConfig({**shared, **s.raw}, s.path, s.prefix) for s in nested if s is not None]

    def _present(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if self.has(name)), None)

    def _required(self, names: Sequence[str], default: Value | None) -> Value:
        if default is None:
            others = f" (nor {', '.join(names[1:])})" if len(names) > 1 else ""
            raise CheckpointError(f"{self.path}: has no {self.prefix}{names[0]}{others}")
        return default

    def _integer(self, name: str, value: object, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"is {shown(value)}; it must be an integer")
        if not low <= value <= high:
            raise self.error(name, f"is {value}; it must be from {low} to {high}")
        return value

    def _string(self, name: str, value: object, choices: Sequence[str]) -> str:
        if not isinstance(value, str):
            raise self.error(name, f"is {shown(value)}; it must be a string")
        if choices and value not in choices:
            raise self.error(name, f"is {shown(value)}; it must be one of {', '.join(choices)}")
        return value

    def _list(self, name: str) -> list[Any]:
        value = self.raw[name]
        if not isinstance(value, list):
            raise self.error(name, f"is {shown(value)}; it must be a list")
        return value


@dataclass(frozen=True, slots=True)
class _RopeOptions:
    """Which numbers a kind of rotary embedding reads."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    has_original_length: bool = False


_ROPE_KINDS = {
    "default": _RopeOptions(),
    "linear": _RopeOptions(("factor",)),
    "dynamic": _RopeOptions(("factor",), has_original_length=True),
    "llama3": _RopeOptions(
        ("factor", "low_freq_factor", "high_freq_factor"), has_original_length=True
    ),
    "yarn": _RopeOptions(
        (),
        ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        has_original_length=True,
    ),
}
_ORIGINAL_LENGTH = "original_max_position_embeddings"
# Where 0 has a meaning: an mscale of 0 switches it off. The rest divide, or are taken the log of.
_MAY_BE_ZERO = ("mscale", "mscale_all_dim")
_SMALLEST = 1e-30


def _rope_spec(config: HFConfig, section: HFConfig, default_theta: float) -> RopeSpec:
    """Read one rope object of `config`, with all that it leaves to the config or to a default."""
    theta = section.optional_number("rope_theta", low=_SMALLEST, high=1e30)
    if theta is None:
        theta = config.number("rope_theta", low=_SMALLEST, high=1e30, default=default_theta)
    for place in (section, config):
        share = place.number("partial_rotary_factor", default=1.0)
        if share != 1.0:
            raise place.error(
                "partial_rotary_factor", f"is {share:g}; only 1, the whole head, is supported yet"
            )
    kind = section.string("rope_type", "type", choices=tuple(_ROPE_KINDS), default="default")
    wanted = _ROPE_KINDS[kind]
    options = {name: section.number(name, low=_SMALLEST) for name in wanted.required}
    for name in wanted.optional:
        value = section.optional_number(name, low=0.0 if name in _MAY_BE_ZERO else _SMALLEST)
        if value is not None:
            options[name] = value
    if wanted.has_original_length:
        options[_ORIGINAL_LENGTH] = _original_length(config, section)
    if kind == "yarn":
        options["truncate"] = float(section.boolean("truncate", default=True))
        if "factor" not in options:
            length = config.integer("max_position_embeddings", low=1)
            options["factor"] = length / options[_ORIGINAL_LENGTH]
    if kind == "llama3" and options["high_freq_factor"] <= options["low_freq_factor"]:
        raise section.error(
            "high_freq_factor",
            f"is {options['high_freq_factor']:g}; it must be above low_freq_factor, "
            f"{options['low_freq_factor']:g}",
        )
    return RopeSpec(theta=theta, kind=kind, options=options)


def _original_length(config: HFConfig, section: HFConfig) -> float:
    """Return the length that the model was first trained on, in tokens."""
    for place in (config, section):
        length = place.optional_number(_ORIGINAL_LENGTH, low=1, high=MAX_INTEGER)
        if length is not None:
            return length
    return float(config.integer("max_position_embeddings", low=1))


def _rope_text(rope: RopeSpec) -> str:
    options = "".join(f", {name} {value:g}" for name, value in sorted(rope.options.items()))
    return f"{rope.kind} with theta {rope.theta:g}{options}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What the checkpoint's makers suggest for sampling; None where they say nothing.

    temperature is 0, greedy, where do_sample is false. eos_token_ids end an output.
    """

    eos_token_ids: frozenset[int] = field(default_factory=frozenset)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Read `folder`/generation_config.json, which may be absent; eos falls back to config.json."""
    path = folder / GENERATION_FILE
    config = HFConfig(strict_json.read_object(path) if os.path.lexists(path) else {}, path)
    eos = _token_ids(config, "eos_token_id")
    if eos is None:
        eos = _token_ids(HFConfig.read(folder), "eos_token_id")
    temperature = config.optional_number("temperature", low=0.0, high=1e4)
    if not config.boolean("do_sample", default=True):
        temperature = 0.0
    return GenerationDefaults(
        eos_token_ids=frozenset(eos or ()),
        temperature=temperature,
        top_p=config.optional_number("top_p", low=_SMALLEST, high=1.0),
        top_k=config.optional_integer("top_k", low=-1),
        min_p=config.optional_number("min_p", low=0.0, high=1.0),
        repetition_penalty=config.optional_number("repetition_penalty", low=_SMALLEST, high=1e4),
        max_new_tokens=config.optional_integer("max_new_tokens", low=1),
    )


def _token_ids(config: HFConfig, name: str) -> tuple[int, ...] | None:
    """Return the token ids in a field that holds one or a list, or None if it is absent."""
    if not config.has(name):
        return None
    if isinstance(config.raw[name], list):
        return config.integers(name)
    return (config.integer(name),)
