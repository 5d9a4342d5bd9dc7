"""Which model types there are, and the spec of a folder."""

from __future__ import annotations

from moe_serve import plugin
from moe_serve.errors import ConfigError, nearest
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.spec import ModelSpec

_PACKAGE = "moe_serve.models"
# what is in this folder and is no model
_MACHINERY = frozenset(
    {
        "checkpoint",
        "checkpoint_folder",
        "decoder",
        "dummy",
        "expert_packing",
        "expert_weights",
        "hf_config",
        "registry",
        "safetensors_file",
        "spec",
        "strict_json",
    }
)


def model_types() -> tuple[str, ...]:
    """List the model types that can be run: the files of this folder that describe a model."""
    return tuple(name for name in plugin.names(_PACKAGE) if name not in _MACHINERY)


def read_spec(config: HFConfig) -> ModelSpec:
    """Return the spec of a config; an unknown model_type is a ConfigError that lists the known."""
    model_type = config.string("model_type")
    known = model_types()
    if model_type not in known:
        raise ConfigError(
            f"{config.path}: model_type {model_type!r} is not supported"
            f"{nearest(model_type, known)} (supported: {', '.join(known)})"
        )
    spec: ModelSpec = plugin.load(_PACKAGE, model_type).build(config)
    return spec
