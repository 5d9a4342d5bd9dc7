"""Where a model's tensors are, for a device that is not here: what is mixed is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.kernels import suite
from moe_serve.models.decoder import build_decoder
from moe_serve.models.dummy import dummy_weights
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.types import ForwardBatch
from tests.models import tiny

pytest.importorskip("triton")

# tensors there have no bytes, and cannot be mixed with those on the host
ELSEWHERE = torch.device("meta")


class _Launches:
    """Takes kernels' launches: checks where their tensors are, runs none."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = kernel.fn.__name__
        self.names.add(name)
        for place, value in enumerate([*args, *kwargs.values()]):
            if isinstance(value, Tensor):
                assert value.device == ELSEWHERE, f"{name}: argument {place} is on {value.device}"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> _Launches:
    from triton.runtime.interpreter import InterpretedFunction

    from moe_serve.kernels.gpu import triton as gpu

    if not gpu.IS_INTERPRETED:
        pytest.skip("kernels are compiled here")
    taken = _Launches()
    monkeypatch.setattr(InterpretedFunction, "run", lambda *a, **k: taken.run(*a, **k))
    for module in ("gpu", "linear", "moe", "sampling"):
        found = __import__(f"moe_serve.kernels.{module}.triton", fromlist=["device"])
        if hasattr(found, "device"):
            monkeypatch.setattr(found, "device", lambda: ELSEWHERE)
    return taken


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_all_of_a_model_is_on_its_device(
    model_type: str, launches: _Launches, tmp_path: Path
) -> None:
    tiny.save_checkpoint(tmp_path, model_type)
    spec = read_spec(HFConfig.read(tmp_path))
    with torch.inference_mode():
        kernels = suite.load("triton")
        assert kernels.device == ELSEWHERE
        decoder = build_decoder(
            spec,
            torch.bfloat16,
            kernels,
            64,
            lambda into: dummy_weights(spec, torch.bfloat16, device=kernels.device, into=into),
        )
        caches = decoder.allocate_caches((4,) * len(decoder.groups), 16)
        batch = _batch(len(decoder.groups)).on(ELSEWHERE)
        hidden = decoder.forward(batch, caches)
        logits = decoder.logits(hidden[batch.sample_rows])
    assert hidden.device == logits.device == ELSEWHERE
    assert {"_attend", "_linear"} <= launches.names
    assert batch.sequence_ids.device.type == "cpu"


def _batch(num_groups: int) -> ForwardBatch:
    """Return a decode after 4 tokens, and a prompt of 3."""
    tokens = torch.tensor([5, 6, 7, 8])
    positions = torch.tensor([4, 0, 1, 2])
    return ForwardBatch(
        token_ids=tokens,
        positions=positions,
        sequence_ids=torch.tensor([0, 1, 1, 1]),
        query_lens=(1, 3),
        context_lens=(5, 3),
        prompt_lens=(4, 3),
        slot_mapping=(positions + 16,) * num_groups,
        block_tables=(torch.tensor([[1], [2]], dtype=torch.int32),) * num_groups,
        block_size=16,
        sample_rows=torch.tensor([0, 3]),
    )
