"""The pass of a GPU with Triton's kernels: interpreted here, on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from moe_serve.kernels.gpu import buckets
from tests.kernels.forward.decoders import (
    Offloaded,
    Steps,
    caches_of,
    check_caches,
    decoder_of,
    spec_of,
)  # fmt: skip
from tests.kernels.implementations import EACH_ON_A_GPU, kernels
from tests.kernels.row_independence import same_bits


@pytest.fixture(autouse=True)
def _small_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_LEAST_CONTEXT", 32)


@EACH_ON_A_GPU
@pytest.mark.parametrize(
    ("model_type", "num_layers", "dtype", "slots"),
    [
        ("qwen2", 1, torch.float32, None),
        ("qwen2_moe", 1, torch.bfloat16, None),
        ("qwen3_moe", 2, torch.float32, 3),
    ],
    ids=["dense", "shared-expert", "cache"],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_steps_have_the_bits_of_layer_by_layer(
    name: str, model_type: str, num_layers: int, dtype: torch.dtype, slots: int | None
) -> None:
    suite = kernels(name)
    changes = {"num_hidden_layers": num_layers, "num_experts": 4}
    spec = spec_of(model_type, changes if slots is None else {**changes, "num_experts": 6})
    plain = decoder_of(spec, suite, dtype)
    offloaded = None if slots is None else Offloaded(spec, suite, dtype, slots)
    decoder = decoder_of(spec, suite, dtype) if offloaded is None else offloaded.decoder
    plain_caches, caches = caches_of(plain), caches_of(decoder)
    run = decoder.fused(caches)
    assert run is not None
    steps = Steps(len(plain.groups))
    with torch.inference_mode():
        for batch in (steps.decodes([20, 30, 32]), steps.decodes([31, 2, 3])):
            want = plain.forward(batch, plain_caches)
            with decoder.experts.step(batch) as watcher:
                assert same_bits(run(batch, watcher), want)
    check_caches(plain_caches, caches)
    for layer, table in plain.experts.layers.items():
        assert torch.equal(table.uses, decoder.experts.layers[layer].uses)
    decoder.experts.close()
