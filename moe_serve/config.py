"""One frozen tree of options, made once. Defaults live here and nowhere else.

A leaf's name is unique in the whole tree, so that it is also the keyword of `LLM(...)`, the flag
(`--block-size`), the environment variable (`MOE_SERVE_BLOCK_SIZE`) and the key of a TOML file.
Precedence: keyword or flag, environment, file, default. Names of alternatives (a scheduling policy)
are checked where they are resolved, not here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from moe_serve.errors import ConfigError, nearest

ENVIRONMENT_PREFIX = "MOE_SERVE_"
EMBEDDED_MODEL = "demo-moe"
# of `moe_serve.server.options`: set for a server, and no fault of other verbs beside it
SERVER_VARIABLES = frozenset(
    f"{ENVIRONMENT_PREFIX}{name}"
    for name in (
        "HOST", "PORT", "API_KEY", "ALLOWED_HOSTS", "SERVED_MODEL_NAME", "MAX_QUEUE_REQUESTS",
        "MAX_QUEUE_WAIT", "MAX_REQUESTS_PER_KEY", "REQUEST_TIMEOUT", "STREAM_INTERVAL",
        "SHUTDOWN_TIMEOUT", "MAX_WORLDS", "STATS_INTERVAL",
    )
)  # fmt: skip


# what Kubernetes puts into the environment beside a service of the name "moe-serve"
_OF_KUBERNETES = re.compile(
    rf"{ENVIRONMENT_PREFIX}(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    rf"|{ENVIRONMENT_PREFIX}PORT=(tcp|udp|sctp)://.*"
)
# positions, blocks and slots of the KV are counted in int32 somewhere
_MAX_COUNT = 2**31 - 1
_MAX_SEQS = 2**20
_MAX_THREADS = 2**12
_MAX_KV_GIB = 2**20
_LEAST_LINK = 1e-3
MOST_RANKS = 1024


def _within(name: str, value: int | None, low: int, high: int = _MAX_COUNT) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must be from {low} to {high}")


@dataclass(frozen=True, kw_only=True, slots=True)
class KVConfig:
    """Where keys and values live."""

    block_size: int = field(default=16, metadata={"help": "Tokens in one KV block, 1 to 64."})
    num_kv_blocks: int | None = field(
        default=None, metadata={"help": "KV blocks; default: what kv_cache_gb holds."}
    )
    kv_cache_gb: float | None = field(
        default=None,
        metadata={"help": "Memory for KV, GiB; default: enough for max_num_seqs, bounded."},
    )
    enable_prefix_caching: bool = field(
        default=True,
        metadata={"help": "Keep blocks of finished requests for prompts that begin alike."},
    )

    def __post_init__(self) -> None:
        _within("block_size", self.block_size, 1, 64)
        _within("num_kv_blocks", self.num_kv_blocks, 1)
        if self.kv_cache_gb is not None and not 0 < self.kv_cache_gb <= _MAX_KV_GIB:
            raise ConfigError(
                f"kv_cache_gb is {self.kv_cache_gb}; it must be above 0, and at most {_MAX_KV_GIB}"
            )
        if self.num_kv_blocks is not None and self.kv_cache_gb is not None:
            raise ConfigError("num_kv_blocks and kv_cache_gb both set the KV memory; give one")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """What may run in one step."""

    max_num_seqs: int = field(default=256, metadata={"help": "Sequences that run at once."})
    max_num_batched_tokens: int = field(
        default=2048, metadata={"help": "Tokens in one step: decodes, then prompt chunks."}
    )
    max_prefill_chunk: int | None = field(
        default=None,
        metadata={"help": "Prompt tokens of one request in one step; default: the budget."},
    )
    admission_horizon: int = field(
        default=16,
        metadata={
            "help": "Tokens of KV room per running sequence, kept when a prompt is admitted."
        },
    )
    scheduling_policy: str = field(
        default="fcfs",
        metadata={"help": "A file in engine/policies.", "package": "moe_serve.engine.policies"},
    )

    def __post_init__(self) -> None:
        _within("max_num_seqs", self.max_num_seqs, 1, _MAX_SEQS)
        _within("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _within("max_prefill_chunk", self.max_prefill_chunk, 1)
        _within("admission_horizon", self.admission_horizon, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which weights, and how they are held."""

    model: str = field(
        default=EMBEDDED_MODEL, metadata={"help": "A folder, a hub name, or demo-moe."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "A folder; default: the model's."}
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a hub name."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "auto, bfloat16, float32.", "choices": ("auto", "bfloat16", "float32")},
    )
    load_format: str = field(
        default="safetensors",
        metadata={
            "help": "safetensors, or dummy: random weights from the config alone.",
            "choices": ("safetensors", "dummy"),
        },
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "Longest prompt + output; default: the model's own."}
    )

    def __post_init__(self) -> None:
        _within("max_model_len", self.max_model_len, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """Where expert weights are, who leaves when a slot is needed, and what is brought in early."""

    expert_cache_slots: int | None = field(
        default=None,
        metadata={"help": "Experts of each layer held in memory; default: what fits."},
    )
    expert_cache_gb: float | None = field(
        default=None,
        metadata={"help": "Memory for experts, GiB, of each rank; default: what fits."},
    )
    expert_cache_scope: str = field(
        default="layer",
        metadata={
            "help": "layer: each has its own slots; shared: beyond top_k a layer, all draw on one "
            "pool; global: one pool.",
            "choices": ("layer", "shared", "global"),
        },
    )
    expert_stream_slots: int | None = field(
        default=None,
        metadata={
            "help": "Slots beside the cache through which a prompt's experts come, on a GPU before "
            "host memory; 0: none. Default: 1/16 of the cache, 512 MiB at most."
        },
    )
    eviction: str = field(
        default="adaptive",
        metadata={"help": "A file in experts/policies.", "package": "moe_serve.experts.policies"},
    )
    prefetch: str = field(
        default="auto",
        metadata={
            "help": "Bring experts in before they are needed: on, off, or auto: while that pays.",
            "choices": ("auto", "on", "off"),
        },
    )
    predictor: str = field(
        default="learned_ids",
        metadata={"help": "A file in predictors.", "package": "moe_serve.predictors"},
    )
    predictor_state: str | None = field(
        default=None,
        metadata={"help": "A file of train-predictor to start from; it is adapted as it runs."},
    )
    miss: str = field(
        default="auto",
        metadata={
            "help": "What is not there is copied; split: or run where it lies, so that both end "
            "together (on a CPU that is mostly to run it there: few slots are then used); auto: "
            "split where that gives the same bits.",
            "choices": ("auto", "copy", "split"),
        },
    )
    expert_store: str | None = field(
        default=None,
        metadata={"help": "Folder of the packed experts; default: in the user's cache."},
    )
    usage_profile: str | None = field(
        default=None,
        metadata={
            "help": "File of which experts were used: read at start, written at the end; with "
            "ranks one for each (NAME-rank0...)."
        },
    )
    record_trace: str | None = field(
        default=None, metadata={"help": "Record every token's experts in this .npz file."}
    )
    enable_return_routed_experts: bool = field(
        default=False,
        metadata={
            "help": "Requests may ask for the experts of each of their tokens "
            "(return_routed_experts): 2 bytes for each token, layer and expert of a token."
        },
    )
    emulate_link: float | None = field(
        default=None,
        metadata={
            "help": "For measurements: experts in host memory behind a link of so many GB/s."
        },
    )

    def __post_init__(self) -> None:
        _within("expert_cache_slots", self.expert_cache_slots, 1)
        _within("expert_stream_slots", self.expert_stream_slots, 0)
        for name in ("expert_cache_gb", "emulate_link"):
            value = getattr(self, name)
            least = _LEAST_LINK if name == "emulate_link" else 0.0
            if value is not None and not least < value <= _MAX_KV_GIB:
                raise ConfigError(
                    f"{name} is {value}; it must be above {least:g}, at most {_MAX_KV_GIB}"
                )
        if self.expert_cache_slots is not None and self.expert_cache_gb is not None:
            raise ConfigError(
                "expert_cache_slots and expert_cache_gb both set the experts' memory; give one"
            )

    @property
    def is_limited(self) -> bool:
        """Whether the options say how much memory experts get."""
        return self.expert_cache_slots is not None or self.expert_cache_gb is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class RanksConfig:
    """How a model is spread over processes, its ranks."""

    ep_size: int | None = field(
        default=None,
        metadata={
            "help": "Option ep_size: ranks that share the experts, started here; under torchrun: "
            "the world's size.",
            "flag": "--ep",
        },
    )
    placement: str = field(
        default="contiguous",
        metadata={
            "help": "Which rank holds which experts: a file of `moe-serve place`, or contiguous, "
            "or round_robin."
        },
    )
    dispatcher: str = field(
        default="auto",
        metadata={
            "help": "How tokens travel to their experts: a file in comm.",
            "package": "moe_serve.comm",
        },
    )
    combine: str = field(
        default="exact",
        metadata={
            "help": "partial: ranks may add up their own experts' results before they send them "
            "(dispatchers dedup_sums, static_sums): fewer bytes, not those of one process.",
            "choices": ("exact", "partial"),
        },
    )
    replicas: str = field(
        default="nearest",
        metadata={
            "help": "Which replica of an expert a token takes: the nearest, each in its turn, or "
            "such that a rank's tokens are spread evenly.",
            "choices": ("nearest", "round_robin", "water_filling"),
        },
    )
    home: str = field(
        default="load",
        metadata={
            "help": "Which rank a request runs on: load: the one with the fewest tokens to come; "
            "affinity: of those hardly busier the one that holds most of what tokens like its "
            "prompt's have used.",
            "choices": ("load", "affinity"),
        },
    )
    rebalance: int | None = field(
        default=None,
        metadata={
            "help": "Every so many steps, see whether experts would be better placed otherwise, "
            "and move them if so; default: never."
        },
    )
    rebalance_strategy: str = field(
        default="joint",
        metadata={
            "help": "A file in experts/placement, for --rebalance.",
            "package": "moe_serve.experts.placement",
        },
    )
    rebalance_slots: int | None = field(
        default=None,
        metadata={
            "help": "Experts of a layer on each rank, for --rebalance: more than its share makes "
            "replicas."
        },
    )

    def __post_init__(self) -> None:
        _within("ep_size", self.ep_size, 1, MOST_RANKS)
        _within("rebalance", self.rebalance, 1)
        _within("rebalance_slots", self.rebalance_slots, 1)
        if self.rebalance_slots is not None and self.rebalance is None:
            raise ConfigError("rebalance_slots is for rebalance; give that too, or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """What computes."""

    kernels: str = field(
        default="auto",
        metadata={
            "help": "triton (a GPU), cpu (native), reference (plain torch), or auto: the best "
            "there is.",
            "choices": ("auto", "cpu", "reference", "triton"),
        },
    )
    isa: str = field(
        default="auto",
        metadata={
            "help": "Instruction set of the native kernels; see `moe-serve doctor`.",
            "choices": ("auto", "avx512_bf16", "plain"),
        },
    )
    numerics: str = field(
        default="exact",
        metadata={
            "help": "On a GPU: exact: a token's bits do not depend on what else ran; fast: kernels "
            "may choose their tiles by the number of rows. On a CPU all is exact.",
            "choices": ("exact", "fast"),
        },
    )
    gpu_memory_utilization: float = field(
        default=0.9,
        metadata={"help": "Share of a GPU's memory that is used, with what others use of it."},
    )
    fused: bool = field(
        default=True,
        metadata={
            "help": "A whole forward pass in one native call, or as CUDA graphs: the same bits, "
            "less Python."
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; default: torch's choice."}
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "Base of the seeds of requests that bring none; a server that is not given one "
            "draws them at random."
        },
    )

    def __post_init__(self) -> None:
        _within("threads", self.threads, 1, _MAX_THREADS)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0, and "
                "at most 1"
            )
        _within("seed", self.seed, -(2**63), 2**63 - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """All options of one engine."""

    weights: ModelConfig = field(default_factory=ModelConfig)
    kv: KVConfig = field(default_factory=KVConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from leaf names and values; an unknown name or a wrong type is a ConfigError."""
        return cls(**build_branches(cls, options))

    def options(self) -> dict[str, Any]:
        """Return every leaf by name: what `from_options` makes this of."""
        return options_of(self)


def options_of(tree: Any) -> dict[str, Any]:
    """Return every leaf of a tree by name."""
    leaves = option_fields(type(tree))
    return {leaf.name: getattr(getattr(tree, leaf.branch), leaf.name) for leaf in leaves}


def build_branches(tree: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the branches of `tree`, by name, that the leaves in `options` are in."""
    leaves = {leaf.name: leaf for leaf in option_fields(tree)}
    branches: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if name not in leaves:
            raise ConfigError(f"no option {name!r}{_meant(name, leaves)}")
        leaf = leaves[name]
        _check_type(leaf, value)
        branches.setdefault(leaf.branch, {})[name] = value
    hints = typing.get_type_hints(tree)
    return {branch: hints[branch](**values) for branch, values in branches.items()}


def _meant(name: str, leaves: Mapping[str, OptionField]) -> str:
    """Return what an unknown name was meant to be: that of a flag, or what is spelled alike."""
    for leaf in leaves.values():
        if leaf.flag == f"--{name}":
            return f"; {leaf.flag} is the flag of {leaf.name!r}"
    return nearest(name, leaves)


def changed(branch: Any) -> list[str]:
    """Return the leaves of a branch that have another value than by default."""
    plain = type(branch)()
    return [leaf.name for leaf in dataclasses.fields(branch)
            if getattr(branch, leaf.name) != getattr(plain, leaf.name)]  # fmt: skip


@dataclass(frozen=True, slots=True)
class OptionField:
    """One leaf of a tree: where it sits, its type without None, and what the help says.

    flag: on the command line, where it is not the name.
    """

    branch: str
    name: str
    kind: type
    is_optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    package: str | None
    flag: str | None


def option_fields(tree: type = EngineConfig) -> Iterator[OptionField]:
    """Yield every leaf of `tree`, branches of dataclasses, in the order of its definition."""
    for branch, branch_type in typing.get_type_hints(tree).items():
        hints = typing.get_type_hints(branch_type)
        for leaf in dataclasses.fields(branch_type):
            hint = hints[leaf.name]
            is_optional = isinstance(hint, types.UnionType)
            kind = (
                next(a for a in typing.get_args(hint) if a is not type(None))
                if is_optional
                else hint
            )
            meta = leaf.metadata
            yield OptionField(
                branch,
                leaf.name,
                kind,
                is_optional,
                leaf.default,
                meta["help"],
                tuple(meta.get("choices", ())),
                meta.get("package"),
                meta.get("flag"),
            )


def _check_type(leaf: OptionField, value: object) -> None:
    if value is None and leaf.is_optional:
        return
    accepted = (int, float) if leaf.kind is float else leaf.kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and leaf.kind is not bool):
        raise ConfigError(f"{leaf.name} is {value!r}; it must be of type {leaf.kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{leaf.name} is {value}; it must be a finite number")
    if leaf.choices and value not in leaf.choices:
        raise ConfigError(
            f"{leaf.name} is {value!r}{nearest(str(value), leaf.choices)} "
            f"(there are: {', '.join(leaf.choices)})"
        )


def resolve_options(
    flags: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    file: str | Path | None = None,
    trees: Sequence[type] = (EngineConfig,),
) -> dict[str, Any]:
    """Merge the sources of options, the first that has one winning: flags, environment, TOML file.

    A flag that is None was not given. An environment variable with our prefix, or a key of the
    file, that names no option is an error; variables of a server's options (`SERVER_VARIABLES`)
    are passed over where `trees` have no such option, and those that Kubernetes sets for a service
    of the name "moe-serve" always.
    """
    leaves = {leaf.name: leaf for tree in trees for leaf in option_fields(tree)}
    merged: dict[str, Any] = {}
    if file is not None:
        merged.update(_read_toml(Path(file)))
        for name in merged:
            if name not in leaves:
                raise ConfigError(f"{file}: no option {name!r}{_meant(name, leaves)}")
    for variable, text in (os.environ if environ is None else environ).items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if name not in leaves and variable in SERVER_VARIABLES:
                continue
            if _OF_KUBERNETES.fullmatch(f"{variable}={text}"):
                continue
            if flags.get(name) is not None:
                continue
            if name not in leaves:
                raise ConfigError(f"environment {variable}: no such option{_meant(name, leaves)}")
            merged[name] = _parse(leaves[name], variable, text)
    merged.update({name: value for name, value in flags.items() if value is not None})
    return merged


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def _parse(leaf: OptionField, source: str, text: str) -> Any:
    if leaf.kind is bool:
        words = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
        if text.lower() not in words:
            raise ConfigError(f"{source} is {text!r}; use 1 or 0")
        return words[text.lower()]
    try:
        return leaf.kind(text)
    except ValueError as error:
        raise ConfigError(
            f"{source} is {text!r}; it must be of type {leaf.kind.__name__}"
        ) from error
