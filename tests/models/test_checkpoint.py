"""Filling a spec's tensors from safetensors files: layouts, dtypes, memory, what is left over."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_serve.errors import CapacityError, CheckpointError
from moe_serve.layers.rope import RopeSpec
from moe_serve.models import checkpoint
from moe_serve.models.checkpoint import is_finite, load_weights, weights_bytes
from moe_serve.models.checkpoint_folder import Checkpoint, model_hash
from moe_serve.models.expert_weights import ExpertWeights
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.models.spec import AttentionSpec, LayerSpec, ModelSpec, Part, WeightSpec
from tests.kernels.implementations import FOR_MODELS, kernels
from tests.models.bad_checkpoints import write_checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def spec_of(*weights: WeightSpec, is_embedding_tied: bool = False) -> ModelSpec:
    """A spec of a model that has these weights; the loader reads nothing else of it."""
    return ModelSpec(
        model_type="test",
        vocab_size=8,
        hidden_size=4,
        max_position_embeddings=16,
        norm_eps=1e-6,
        attention=AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=4, rope=RopeSpec(theta=1e4)),
        layers=(LayerSpec(mlp_intermediate_size=4),),
        is_embedding_tied=is_embedding_tied,
        weights=weights,
    )


def whole(name: str, *shape: int, is_fp32: bool = False) -> WeightSpec:
    part = Part(name, shape, (0,) * len(shape))
    return WeightSpec(name, shape, ((part,),), is_fp32=is_fp32)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["demo-moe", "stories260k"])
def test_real_checkpoints_are_read_to_the_bit(
    shared_data: Path, model: str, dtype: torch.dtype
) -> None:
    folder = shared_data / "models" / model
    spec = read_spec(HFConfig.read(folder))
    weights = load_weights(folder, spec, dtype)
    stored = load_file(folder / "model.safetensors")
    for weight in spec.weights:
        ours = weights[weight.name]
        for part in weight.layouts[0]:
            sizes = (1,) * (len(weight.shape) - len(part.shape)) + part.shape
            box = tuple(slice(a, a + n) for a, n in zip(part.start, sizes, strict=True))
            assert torch.equal(ours[box].reshape(part.shape), stored[part.source].to(ours.dtype))
    assert weights_bytes(spec, dtype) == sum(t.numel() * t.itemsize for t in weights.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FOR_MODELS)
def test_experts_are_read_into_their_records(
    shared_data: Path, name: str, dtype: torch.dtype
) -> None:
    folder = shared_data / "models" / "demo-moe"
    spec = read_spec(HFConfig.read(folder))
    plain = load_weights(folder, spec, dtype)
    into = ExpertWeights(spec, dtype, kernels(name)).plain()
    assert into
    seen: list[tuple[int, int]] = []
    weights = load_weights(
        folder, spec, dtype, on_progress=lambda *call: seen.append(call), into=into
    )
    assert seen[-1][0] == seen[-1][1]
    for weight in spec.weights:
        assert torch.equal(weights[weight.name], plain[weight.name])
        assert (weights[weight.name] is into.get(weight.name)) == (weight.name in into)


@pytest.mark.parametrize("held", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [*DTYPES, torch.float64], ids=str)
def test_every_dtype_is_converted(
    tmp_path: Path, stored: torch.dtype, held: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 64)  # many pieces, the last one odd
    monkeypatch.setattr(checkpoint, "RUN_ELEMENTS", 100)
    tensor = normal(37, 11, dtype=stored)
    folder = written(tmp_path, {"a": tensor, "b": tensor[:1].clone()})
    spec = spec_of(whole("a", 37, 11), whole("b", 1, 11, is_fp32=True))
    weights = load_weights(folder, spec, held)
    assert torch.equal(weights["a"], tensor.to(held))
    assert torch.equal(weights["b"], tensor[:1].to(torch.float32))


def test_parts_are_put_at_their_places(tmp_path: Path, poisoned_empty: None) -> None:
    gates, ups = [normal(3, 4), normal(3, 4) + 1], [normal(3, 4) + 2, normal(3, 4) + 3]
    left, right = normal(5, 2), normal(5, 3)
    tensors = {"left": left, "right": right}
    parts = []
    for expert in range(2):
        tensors |= {f"{expert}.gate": gates[expert], f"{expert}.up": ups[expert]}
        parts += [
            Part(f"{expert}.gate", (3, 4), (expert, 0, 0)),
            Part(f"{expert}.up", (3, 4), (expert, 3, 0)),
        ]
    spec = spec_of(
        WeightSpec("gate_up", (2, 6, 4), (tuple(parts),)),
        # side by side: no part lies in one stretch of memory
        WeightSpec(
            "wide", (5, 5), ((Part("left", (5, 2), (0, 0)), Part("right", (5, 3), (0, 2))),)
        ),
    )
    weights = load_weights(written(tmp_path, tensors), spec, torch.float32)
    expected = torch.stack([torch.cat([gates[e], ups[e]]) for e in range(2)])
    assert torch.equal(weights["gate_up"], expected)
    assert torch.equal(weights["wide"], torch.cat([left, right], dim=1))


@pytest.mark.parametrize("source", ["fused", "split"])
def test_whichever_layout_is_there_is_read(tmp_path: Path, source: str) -> None:
    tensor = normal(4, 3)
    tensors = {"fused": tensor} if source == "fused" else {"x": tensor[:2], "y": tensor[2:]}
    split = (Part("x", (2, 3), (0, 0)), Part("y", (2, 3), (2, 0)))
    spec = spec_of(WeightSpec("w", (4, 3), (split, (Part("fused", (4, 3), (0, 0)),))))
    folder = written(tmp_path, {name: part.clone() for name, part in tensors.items()})
    assert torch.equal(load_weights(folder, spec, torch.float32)["w"], tensor)


def test_the_nearest_layout_is_named_when_none_is_whole(tmp_path: Path) -> None:
    other = (Part("p", (2, 3), (0, 0)), Part("q", (2, 3), (2, 0)))
    split = (Part("x", (2, 3), (0, 0)), Part("y", (2, 3), (2, 0)))
    spec = spec_of(WeightSpec("w", (4, 3), (other, split)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has no tensor y, of shape"):
        load_weights(written(tmp_path, {"x": normal(2, 3)}), spec, torch.float32)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    folder = written(tmp_path, {"one": torch.tensor(2.5), "none": torch.zeros(0, 3)})
    weights = load_weights(folder, spec_of(whole("one"), whole("none", 0, 3)), torch.bfloat16)
    assert weights["one"].item() == 2.5
    assert weights["none"].shape == (0, 3)


def test_shards_may_be_links_out_of_the_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "snapshot", is_sharded=True)
    (tmp_path / "blobs").mkdir()
    for place, path in enumerate(sorted((tmp_path / "snapshot").glob("*.safetensors"))):
        path.rename(tmp_path / "blobs" / str(place))
        path.symlink_to(f"../blobs/{place}")
    assert "lm_head.weight" in Checkpoint.open(tmp_path / "snapshot").tensors


def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    folder = written(tmp_path, {name: normal(4, 4) for name in "abc"})
    seen: list[tuple[int, int]] = []
    spec = spec_of(*(whole(name, 4, 4) for name in "abc"))
    load_weights(folder, spec, torch.bfloat16, on_progress=lambda *call: seen.append(call))
    assert seen == [(64, 192), (128, 192), (192, 192)]


def test_unused_tensors_are_reported_but_for_harmless_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a", "lm_head.weight", "model.rotary_emb.inv_freq"]
    folder = written(tmp_path, {name: normal(2) for name in names})
    with caplog.at_level(logging.WARNING):
        load_weights(folder, spec_of(whole("a", 2), is_embedding_tied=True), torch.float32)
        assert caplog.messages == []
        load_weights(folder, spec_of(whole("a", 2)), torch.float32)
    assert "1 tensors are not used by test: lm_head.weight" in caplog.text


def test_a_file_cut_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path, {"a": normal(64, 64)})
    allocate = checkpoint.empty_weight

    def cut_then_allocate(*args: object) -> Tensor:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        return allocate(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "empty_weight", cut_then_allocate)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte .* too soon"):
        load_weights(folder, spec_of(whole("a", 64, 64)), torch.float32)


def test_no_memory_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match=r"^a: no memory for its 4503599627370496 bytes"):
        checkpoint.empty_weight(whole("a", 2**50), torch.float32, "cpu", 2**52)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 31, 4097])
def test_is_finite(dtype: torch.dtype, size: int) -> None:
    largest = torch.finfo(dtype).max
    tensor = torch.full((size,), -largest, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    for place in (0, size // 2, size - 1):
        for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
            broken = tensor.clone()
            broken[place] = value
            assert not is_finite(broken)


def test_hash_is_of_config_headers_times_and_samples(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "two")
    first = model_hash(tmp_path / "one")
    weights = tmp_path / "two" / "model.safetensors"
    status = (tmp_path / "one" / "model.safetensors").stat()
    times = (status.st_atime_ns, status.st_mtime_ns)
    os.utime(weights, ns=times)
    assert first == model_hash(tmp_path / "two")
    os.utime(weights, ns=(times[0], times[1] + 1))
    assert first != model_hash(tmp_path / "two")
    untimed = [model_hash(tmp_path / name, counts_time=False) for name in ("one", "two")]
    assert untimed[0] == untimed[1] != first
    os.utime(weights, ns=times)
    config = tmp_path / "two" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "eos_token_id": 1}))
    assert first != model_hash(tmp_path / "two")
    config.write_text(json.dumps(fields))
    assert first == model_hash(tmp_path / "two")
    write_checkpoint(tmp_path / "two", is_sharded=True)
    assert first != model_hash(tmp_path / "two")


def test_hash_tells_fine_tunes_apart_that_were_written_at_the_same_time(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    written(tmp_path, {"w": normal(1000, 1000)})
    hashes = set()
    for step in (0.0, 1e-3, 2e-3):  # all of the weights change a little, as in training
        written(tmp_path, {"w": normal(1000, 1000) + step})
        os.utime(path, ns=(1, 1))
        hashes.add(model_hash(tmp_path))
    assert len(hashes) == 3
    data = bytearray(path.read_bytes())
    for place in (-1, 4_000_000 // 63 + 50):  # of the last block, and of the second
        data[place] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
        hashes.add(model_hash(tmp_path))
    assert len(hashes) == 5


MEASURE = """
import sys
from pathlib import Path
import torch
from moe_serve.models.checkpoint import load_weights
from moe_serve.models.checkpoint_folder import Checkpoint
from tests.models.test_checkpoint import spec_of, whole

def peak_bytes():
    line = next(s for s in open("/proc/self/status") if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
spec = spec_of(*(whole(t.name, *t.shape) for t in Checkpoint.open(folder).tensors.values()))
before = peak_bytes()
load_weights(folder, spec, torch.bfloat16)
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path, repository: Path) -> None:
    largest = 16 * 2**20
    tensors = {f"t{i}": torch.ones(largest, dtype=torch.bfloat16) for i in range(5)}
    tensors["wide"] = torch.ones(largest, dtype=torch.float32)  # converted as it is read
    written(tmp_path, tensors)
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    model_bytes = 6 * largest * 2
    assert model_bytes <= int(done.stdout) + 2**20
    assert int(done.stdout) < model_bytes + largest * 2 + 16 * 2**20
