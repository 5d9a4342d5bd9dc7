"""From a checkpoint to a store: the bits that memory would hold, in little memory, or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_serve.errors import CapacityError, CheckpointError
from moe_serve.experts.store import ExpertStore
from moe_serve.experts.store_layout import StoreLayout
from moe_serve.kernels.moe.base import HEADER_BYTES
from moe_serve.kernels.native.memory import allocate
from moe_serve.kernels.suite import Kernels
from moe_serve.models import expert_packing
from moe_serve.models.checkpoint import WeightReader, load_weights, weights_bytes
from moe_serve.models.checkpoint_folder import model_hash
from moe_serve.models.dummy import dummy_hash, dummy_weights, fill_dummy_rows
from moe_serve.models.expert_packing import open_or_pack, pack_store, store_layout
from moe_serve.models.expert_weights import (
    ExpertWeights,
    expert_names,
    moe_layers,
    names_without_experts,
)
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec
from moe_serve.models.spec import ModelSpec
from tests.kernels.implementations import DTYPES, EACH_FOR_MODELS, kernels
from tests.models.bad_checkpoints import SINGLE, source_tensors, write_checkpoint

# odd sizes, a layer without experts, and more experts than fit one batch
SIZES = {
    "hidden_size": 40, "moe_intermediate_size": 24, "num_experts": 7, "num_hidden_layers": 3,
    "mlp_only_layers": [1],
}  # fmt: skip


def write_model(folder: Path, form: str = "single") -> ModelSpec:
    """Write a checkpoint of SIZES: one file, two, or one with each layer's experts fused."""
    write_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **SIZES}))
    tensors = source_tensors(folder)
    spec = read_spec(HFConfig.read(folder))
    if form == "fused":
        for weight in spec.weights:
            if weight.name.endswith(("experts.gate_up", "experts.down")):
                parts, (fused,) = weight.layouts
                whole = torch.empty(weight.shape)
                for part in parts:
                    expert, row, _ = part.start
                    whole[expert, row : row + part.shape[0]] = tensors.pop(part.source)
                tensors[fused.source] = whole
    if form == "sharded":
        shards = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(tensors)}
        for shard in set(shards.values()):
            save_file({n: t for n, t in tensors.items() if shards[n] == shard}, folder / shard)
        (folder / SINGLE).unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    else:
        save_file(tensors, folder / SINGLE)
    return spec


Records = dict[tuple[int, int], Tensor]


def in_memory(spec: ModelSpec, dtype: torch.dtype, chosen: Kernels, folder: Path | None) -> Records:
    """Return the records by (layer, expert), as they are where all are resident.

    folder: None for dummy weights.
    """
    experts = ExpertWeights(spec, dtype, chosen)
    into = experts.plain()
    if folder is None:
        dummy_weights(spec, dtype, into=into)
    else:
        load_weights(folder, spec, dtype, into=into)
    return {
        (layer, expert): table.records[slot]
        for layer, table in experts.packed().layers.items()
        for expert, slot in enumerate(table.slot_of_expert.tolist())
    }


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_packing, "BATCH_BYTES", 3 * 12288)


def assert_stored(path: Path, layout: StoreLayout, expected: Records) -> None:
    assert {(stored.layer, expert) for stored, expert in layout.records()} == set(expected)
    with ExpertStore.open(path, layout) as store:
        for (layer, expert), record in expected.items():
            into = allocate(store.record_bytes(layer)).fill_(170)
            store.read(layer, expert, into)
            assert torch.equal(into[HEADER_BYTES:], record[HEADER_BYTES:])


@EACH_FOR_MODELS
@DTYPES
@pytest.mark.parametrize("form", ["single", "sharded", "fused"])
def test_a_store_holds_what_memory_would(
    tmp_path: Path, name: str, dtype: torch.dtype, form: str
) -> None:
    spec = write_model(tmp_path / "model", form)
    layout = store_layout(spec, dtype, kernels(name), model_hash(tmp_path / "model"), "test")
    assert [(stored.layer, stored.num_experts) for stored in layout.layers] == [(0, 7), (2, 7)]
    path = tmp_path / "model.experts"
    reader = WeightReader.open(tmp_path / "model", spec)
    pack_store(path, layout, spec, kernels(name), reader.read)
    assert_stored(path, layout, in_memory(spec, dtype, kernels(name), tmp_path / "model"))


@EACH_FOR_MODELS
@DTYPES
def test_a_store_of_dummy_weights(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    spec = write_model(tmp_path / "model")
    layout = store_layout(spec, dtype, kernels(name), dummy_hash(tmp_path / "model"), "test")
    path = tmp_path / "model.experts"
    pack_store(path, layout, spec, kernels(name), partial(fill_dummy_rows, spec))
    assert_stored(path, layout, in_memory(spec, dtype, kernels(name), None))


@EACH_FOR_MODELS
def test_layers_of_several_shapes(tmp_path: Path, name: str) -> None:
    spec = write_model(tmp_path / "model")
    moe = spec.layers[2].moe
    assert moe is not None
    layers = (*spec.layers[:2], replace(spec.layers[2], moe=replace(moe, intermediate_size=5)))
    shapes = dict(zip(expert_names(2), [(7, 10, 40), (7, 40, 5)], strict=True))
    weights = [replace(w, shape=shapes.get(w.name, w.shape)) for w in spec.weights]
    spec = replace(spec, layers=layers, weights=tuple(weights))
    layout = store_layout(spec, torch.float32, kernels(name), "00" * 32, "test")
    assert layout.layers[0].record_bytes > layout.layers[1].record_bytes
    path = tmp_path / "model.experts"
    pack_store(path, layout, spec, kernels(name), partial(fill_dummy_rows, spec))
    assert_stored(path, layout, in_memory(spec, torch.float32, kernels(name), None))


def test_dummy_rows_go_on_in_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.models.dummy.BLOCK_ELEMENTS", 1009)
    spec = write_model(tmp_path)
    name = expert_names(2)[0]
    whole = dummy_weights(spec, torch.float32, names=[name])
    assert list(whole) == [name]
    part = torch.full((3, *whole[name].shape[1:]), float("nan"))
    fill_dummy_rows(spec, {name: part}, range(2, 5))
    assert torch.equal(part, whole[name][2:5])


def test_the_rest_of_a_model_is_read_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = write_model(tmp_path)
    names = names_without_experts(spec)
    experts = {name for layer in moe_layers(spec) for name in expert_names(layer)}
    assert len(experts) == 4
    assert names.isdisjoint(experts)
    everything = load_weights(tmp_path, spec, torch.bfloat16)
    rest = load_weights(tmp_path, spec, torch.bfloat16, names=names)
    assert set(everything) == names | experts
    assert set(rest) == names
    for name, tensor in rest.items():
        assert torch.equal(tensor, everything[name])
    assert weights_bytes(spec, torch.bfloat16, names) == sum(
        tensor.numel() * tensor.itemsize for tensor in rest.values()
    )
    assert not caplog.messages, "experts that are not read are no surplus"


@pytest.mark.parametrize("form", ["single", "fused"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite_is_named(tmp_path: Path, form: str, value: float) -> None:
    spec = write_model(tmp_path / "model", form)
    chosen = kernels("reference")
    tensors = load_file(tmp_path / "model" / SINGLE)
    source = "model.layers.2.mlp.experts.5.down_proj.weight"
    if form == "fused":
        source = "model.layers.2.mlp.experts.down_proj"
        tensors[source][5, 3, 2] = value
        element = 5 * 40 * 24 + 3 * 24 + 2
    else:
        tensors[source][3, 2] = value
        element = 3 * 24 + 2
    save_file(tensors, tmp_path / "model" / SINGLE)
    layout = store_layout(spec, torch.float32, chosen, "00" * 32, "test")
    (tmp_path / "cache").mkdir()
    reader = WeightReader.open(tmp_path / "model", spec)
    with pytest.raises(CheckpointError, match=f"{source} holds {value:g} at element {element};"):
        pack_store(tmp_path / "cache" / "x.experts", layout, spec, chosen, reader.read)
    assert os.listdir(tmp_path / "cache") == []


def test_a_store_is_packed_once_and_again_when_it_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, chosen = write_model(tmp_path / "model"), kernels("reference")
    layout = store_layout(spec, torch.float32, chosen, "00" * 32, "test")
    path = tmp_path / "x.experts"
    filled: list[range] = []

    def fill(weights: Mapping[str, Tensor], experts: range) -> None:
        filled.append(experts)
        fill_dummy_rows(spec, weights, experts)

    def opened() -> int:
        """Return how many batches were packed."""
        filled.clear()
        open_or_pack(path, layout, spec, chosen, fill).close()
        return len(filled)

    assert (opened(), opened()) == (6, 0)  # 7 experts of two layers, three by three
    assert filled == []
    assert not caplog.messages
    os.truncate(path, 5000)
    assert (opened(), opened()) == (6, 0)
    assert "x.experts: has 5000 bytes; by its header it must have" in caplog.text
    assert "; it is packed anew" in caplog.text


SLOWLY = """
import sys, time
from functools import partial
from pathlib import Path
import torch
from moe_serve.kernels import suite
from moe_serve.models.dummy import fill_dummy_rows
from moe_serve.models.expert_packing import open_or_pack, store_layout
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec

folder = Path(sys.argv[1])
spec, kernels = read_spec(HFConfig.read(folder)), suite.load("reference")
layout = store_layout(spec, torch.float32, kernels, "00" * 32, "test")

def wait(done, total):
    if done < 10000:  # until the other one packs too
        while len(list(folder.glob("x.experts.part-*"))) < 2:
            time.sleep(0.001)
        (folder / f"seen-{sys.argv[2]}").touch()
        while len(list(folder.glob("seen-*"))) < 2:
            time.sleep(0.001)

open_or_pack(folder / "x.experts", layout, spec, kernels, partial(fill_dummy_rows, spec), wait)
"""


def test_two_processes_pack_at_once(tmp_path: Path, repository: Path) -> None:
    spec, chosen = write_model(tmp_path), kernels("reference")
    running = [
        subprocess.Popen([sys.executable, "-c", SLOWLY, str(tmp_path), name], cwd=repository)
        for name in ("one", "two")
    ]
    try:
        assert [process.wait(60) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    assert list(tmp_path.glob("x.experts*")) == [tmp_path / "x.experts"]
    layout = store_layout(spec, torch.float32, chosen, "00" * 32, "test")
    assert_stored(tmp_path / "x.experts", layout, in_memory(spec, torch.float32, chosen, None))


IN_LITTLE_MEMORY = """
import resource, sys, threading
from pathlib import Path
import torch
from moe_serve.errors import CapacityError
from moe_serve.kernels import suite
from moe_serve.models import expert_packing
from moe_serve.models.checkpoint import WeightReader
from moe_serve.models.expert_weights import ExpertWeights
from moe_serve.models.hf_config import HFConfig
from moe_serve.models.registry import read_spec

folder = Path(sys.argv[1])
spec, kernels = read_spec(HFConfig.read(folder)), suite.load()
torch.set_num_threads(1)
threading.stack_size(2**18)  # as many threads read as there are cores
expert_packing.BATCH_BYTES = 2**21
layout = expert_packing.store_layout(spec, torch.bfloat16, kernels, "00" * 32, "test")
reader = WeightReader.open(folder, spec)
line = next(s for s in open("/proc/self/status") if s.startswith("VmData"))
limit = int(line.split()[1]) * 1024 + 12 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    ExpertWeights(spec, torch.bfloat16, kernels)
    raise SystemExit("the limit is none")
except CapacityError:
    pass
expert_packing.pack_store(folder / "x.experts", layout, spec, kernels, reader.read)
print(layout.total_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_packing_needs_little_memory(tmp_path: Path, repository: Path) -> None:
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 64}
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes, "num_hidden_layers": 4}))
    spec = read_spec(HFConfig.read(tmp_path))
    tensors = {
        part.source: torch.ones(part.shape, dtype=torch.bfloat16)
        for weight in spec.weights
        for part in weight.layouts[0]
    }
    save_file(tensors, tmp_path / SINGLE)
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, str(tmp_path)],
        cwd=repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (tmp_path / "x.experts").stat().st_size > 48 * 2**20


def test_no_memory_is_a_capacity_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_bytes: int) -> Tensor:
        raise CapacityError(f"no memory for {num_bytes} bytes")

    spec, chosen = write_model(tmp_path / "model"), kernels("reference")
    layout = store_layout(spec, torch.float32, chosen, "00" * 32, "test")
    monkeypatch.setattr(expert_packing, "allocate", refuse)
    with pytest.raises(CapacityError, match="no memory for 36864 bytes"):
        pack_store(tmp_path / "x", layout, spec, chosen, partial(fill_dummy_rows, spec))
    assert os.listdir(tmp_path) == ["model"]


def test_dummy_hash_is_of_config_and_seed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    first = dummy_hash(tmp_path)
    (tmp_path / SINGLE).unlink()
    assert dummy_hash(tmp_path) == first != dummy_hash(tmp_path, seed=1)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("10000.0", "10001.0"))
    assert dummy_hash(tmp_path) != first
    config.unlink()
    config.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: Is a directory"):
        dummy_hash(tmp_path)
