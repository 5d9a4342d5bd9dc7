"""A usage profile: how often each expert was used, kept from run to run to warm the next start.

What was used longer ago counts less: every run halves what the runs before it left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from moe_serve.errors import TraceError
from moe_serve.kernels.moe.base import ExpertTable

Array = np.ndarray[Any, Any]
_KIND = "moe_serve usage profile 1"
_DECAY = 0.5
_POLICY = "policy."


@dataclass(frozen=True, slots=True)
class UsageProfile:
    """uses: float64 [num_layers, num_experts], tokens; policy_state: of the policy so named."""

    model_id: str
    uses: Array
    policy: str = ""
    policy_state: Mapping[str, Array] = field(default_factory=dict)

    def hottest(self) -> list[tuple[int, int]]:
        """Return (layer, expert) of all that were used, each layer's first before any second."""
        order = np.argsort(-self.uses, axis=1, kind="stable")  # [num_layers, num_experts]
        return [
            (layer, int(order[layer, rank]))
            for rank in range(order.shape[1])
            for layer in range(order.shape[0])
            if self.uses[layer, order[layer, rank]] > 0
        ]


class ProfileKeeper:
    """Writes, at the end of a run, the profile that the next one starts from."""

    def __init__(self, path: Path, before: UsageProfile, policy: str) -> None:
        """before: what this run started from; policy: the name of the eviction policy."""
        self.path = path
        self.before = before
        self._policy = policy

    def write(
        self, layers: Mapping[int, ExpertTable], policy_state: Mapping[str, Array] | None = None
    ) -> None:
        """Add this run's uses, which the kernels counted, by layer. Raises TraceError."""
        uses = self.before.uses * _DECAY
        for index, layer in enumerate(sorted(layers)):
            counted = layers[layer].uses.numpy()
            uses[index, : len(counted)] += counted
        profile = UsageProfile(self.before.model_id, uses, self._policy, policy_state or {})
        write_profile(self.path, profile)


def read_profile(path: Path, model_id: str, num_layers: int, num_experts: int) -> UsageProfile:
    """Read a profile, or make an empty one where there is no file.

    Raises TraceError for a file that is none, or of another model.
    """
    if not path.exists():
        return UsageProfile(model_id, np.zeros((num_layers, num_experts)))
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise TraceError(f"{path}: not a usage profile ({error})") from error
    uses = arrays.pop("uses", None)
    if metadata.get("kind") != _KIND or uses is None:
        raise TraceError(f"{path}: not a usage profile of this version; give another file")
    if metadata.get("model_id") != model_id or uses.shape != (num_layers, num_experts):
        raise TraceError(
            f"{path}: a usage profile of another model ({metadata.get('model_id')}, "
            f"{list(uses.shape)} experts), not of this one ({model_id}, "
            f"{[num_layers, num_experts]}); give another file"
        )
    state = {name.removeprefix(_POLICY): array for name, array in arrays.items()}
    return UsageProfile(model_id, uses, metadata.get("policy", ""), state)


def write_profile(path: Path, profile: UsageProfile) -> None:
    """Write a profile; the file appears whole or not at all. Raises TraceError."""
    arrays = {"uses": profile.uses}
    arrays |= {f"{_POLICY}{name}": array for name, array in profile.policy_state.items()}
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    metadata = {"kind": _KIND, "model_id": profile.model_id, "policy": profile.policy}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = safetensors.numpy.save(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata
        )
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise TraceError(f"{path}: cannot be written ({error.strerror})") from error
