"""Make a model's experts as they were planned: all in memory, or a cache before a store or a host.

Everything that offloading consists of is put together here, and measured where its choices depend
on the machine: how long a load takes, and an expert in memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_serve import plugin
from moe_serve.config import EngineConfig
from moe_serve.engine.expert_times import device_times, expert_s, least_s, split_costs
from moe_serve.engine.memory import available_bytes
from moe_serve.engine.ranks import Share
from moe_serve.engine.residency import Residency
from moe_serve.errors import ConfigError, StoreError
from moe_serve.experts.cache import ExpertCache
from moe_serve.experts.calibration import Calibration
from moe_serve.experts.device_transfer import DeviceTransfers
from moe_serve.experts.executor import Experts
from moe_serve.experts.host_experts import HostExperts
from moe_serve.experts.native_transfer import open_transfers
from moe_serve.experts.offload import HostTier, OffloadedExperts
from moe_serve.experts.packing import one_at_a_time
from moe_serve.experts.predictor_state import read_state
from moe_serve.experts.prefetch import MAX_DISTANCE, LinkTimes, Prefetcher
from moe_serve.experts.profile import ProfileKeeper, read_profile
from moe_serve.experts.read_ahead import ReadAhead
from moe_serve.experts.recorder import RoutingRecorder
from moe_serve.experts.slots import DeviceSlots, FixedSlots, GrowingSlots, SlotMemory
from moe_serve.experts.split import MissCosts, MissPlanner
from moe_serve.experts.staged_transfer import StagedTransfers
from moe_serve.experts.store import ExpertStore
from moe_serve.experts.store_layout import store_path
from moe_serve.experts.transfer import (
    CHUNK_BYTES,
    EmulatedLink,
    Source,
    StoreSource,
    Transfers,
)
from moe_serve.kernels.gpu.streams import Streams
from moe_serve.kernels.gpu.streams import streams as gpu_streams
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.kernels.suite import Kernels
from moe_serve.models.checkpoint import WeightReader, load_weights
from moe_serve.models.checkpoint_folder import model_hash
from moe_serve.models.dummy import dummy_hash, dummy_weights, fill_dummy_rows
from moe_serve.models.expert_packing import FillExperts, open_or_pack, store_layout
from moe_serve.models.expert_weights import ExpertWeights, moe_layers, names_without_experts
from moe_serve.models.spec import ModelSpec
from moe_serve.predictors.base import Array, Gates, Predictor, PredictorShape

logger = logging.getLogger(__name__)

DISK_THREADS = 4
_LINK_THREADS = 1
_NUM_STAGED = 2 * DISK_THREADS  # records on their way from disk to a GPU
_SHARE_OF_HOST = 0.8  # of the host's free memory, for records

Progress = Callable[[int, int], None] | None


@dataclass(frozen=True, slots=True)
class _Tier:
    """Where slots are, and where what is not in them comes from; times measures how fast."""

    queue: Transfers
    memory: SlotMemory
    times: Callable[[], LinkTimes]
    host: HostTier | HostExperts | None = None
    ahead: ReadAhead | None = None


class ExpertParts:
    """Loads a model's weights and makes its experts, in the order that memory wants."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        dtype: torch.dtype,
        kernels: Kernels,
        residency: Residency,
        folder: Path,
        numerics_id: str,
        keeper: ProfileKeeper | None = None,
        on_progress: Progress = None,
        share: Share | None = None,
    ) -> None:
        self._config = config
        self._spec = spec
        self._dtype = dtype
        self._kernels = kernels
        self._device = kernels.device
        self._residency = residency
        self._folder = folder
        self._numerics_id = numerics_id
        self._keeper = keeper
        self._on_progress = on_progress
        self._share = share
        self._layers = moe_layers(spec)
        self._is_dummy = config.weights.load_format == "dummy"

    def load(self) -> tuple[dict[str, Tensor], Experts]:
        """Return all other weights by name, and the experts.

        Raises CheckpointError for weights that cannot be used, StoreError where experts cannot be
        packed to disk, CapacityError, ConfigError.
        """
        shape = self._residency.shape
        keeper, name = self._keeper, self._config.experts.eviction
        # a wrong name is wrong wherever experts are
        plugin.load("moe_serve.experts.policies", name, "eviction")
        plugin.load("moe_serve.predictors", self._predictor_name, "predictor")
        if shape is None:
            return self._resident()
        state = None
        if keeper is not None and keeper.before.policy == name:
            state = keeper.before.policy_state
        cache = ExpertCache(
            shape,
            plugin.load("moe_serve.experts.policies", name).build(shape, state),
            self._residency.top_k,
            0 if self._config.experts.expert_cache_scope == "global" else None,
            self._residency.slot_bytes,
            None if self._share is None else self._share.is_held,
        )
        build_predictor = self._predictor(cache)
        recorder = self._recorder()
        link = self._config.experts.emulate_link
        if self._kernels.name == "triton":
            others, tier = self._on_device(cache, link)
        elif link is None:
            others, tier = self._on_disk(cache)
        else:
            others, tier = self._behind_link(cache, link)
        try:
            experts = OffloadedExperts(
                self._kernels.moe,
                self._tables(cache, tier.memory.records),
                cache,
                tier.queue,
                tier.memory,
                tier.host,
                self._prefetcher(cache, tier, build_predictor, self._gates(others)),
                recorder,
                keeper,
                ahead=tier.ahead,
            )
            if keeper is not None:
                experts.preload(keeper.before.hottest())
                if isinstance(tier.queue, DeviceTransfers):
                    experts.finish_loading()  # a second or so; without steps nothing moves on
        except BaseException:
            tier.queue.close()
            raise
        return others, experts

    # -- the four ways -----------------------------------------------------------------------------

    def _resident(self) -> tuple[dict[str, Tensor], Experts]:
        held = None if self._share is None else self._share.held
        weights = ExpertWeights(
            self._spec, self._dtype, self._kernels, held=held, spare_slots=self._spare_slots
        )
        if held is None:
            others = self._fill_all(weights.plain())
        else:
            others = self._fill_others()
            fill = self._fill_experts()
            for into, experts in weights.plain_runs():
                fill(into, experts)
        return others, weights.packed(self._recorder(), self._keeper)

    def _behind_link(self, cache: ExpertCache, gb_per_s: float) -> tuple[dict[str, Tensor], _Tier]:
        """Put all records in host memory, and slots before them in the same arena."""
        num_slots = cache.shape.total_slots
        weights = ExpertWeights(self._spec, self._dtype, self._kernels, num_slots)
        others = self._fill_all(weights.plain())
        weights.pack()
        arena = weights.only_arena()
        source = EmulatedLink(arena.records, arena.num_experts, gb_per_s * 1e9)
        memory = FixedSlots(arena.slots, num_slots)
        costs = self._miss_costs(arena.table(arena.layers[0]), source, arena.slots[0])
        host = HostTier(num_slots, arena.num_experts, MissPlanner(self._config.experts.miss, costs))
        queue = open_transfers(source, arena.slots, num_slots, _LINK_THREADS)
        return others, _Tier(queue, memory, lambda: self._link_times(source, memory), host)

    def _on_disk(self, cache: ExpertCache) -> tuple[dict[str, Tensor], _Tier]:
        """Read records from a store, packed now if there is none as yet."""
        self._warn_of_split()
        store = self._store()
        shape = cache.shape
        try:
            others = self._fill_others()
            memory = GrowingSlots(
                shape.total_slots, shape.num_layers * shape.num_experts, self._residency.slot_bytes
            )
        except BaseException:
            store.close()
            raise
        source = StoreSource(store, self._layers)
        queue = open_transfers(source, memory.records, memory.most_slots, DISK_THREADS)
        return others, _Tier(queue, memory, lambda: self._link_times(source, memory))

    def _on_device(self, cache: ExpertCache, link: float | None) -> tuple[dict[str, Tensor], _Tier]:
        """Put slots on a GPU, before records in host memory, or on disk where they do not fit."""
        if link is not None:
            raise ConfigError(
                "emulate_link stands for a GPU's link, and these are a GPU's kernels; leave it out"
            )
        streams = gpu_streams(self._kernels.device)
        if self._is_held_by_host():
            return self._before_host(cache, streams)
        self._warn_of_split()
        if self._config.experts.expert_stream_slots and self._residency.stream_slots:
            logger.warning(
                "expert_stream_slots has no effect: the experts come from disk, which is slower "
                "than the link"
            )
        source = StoreSource(self._store(), self._layers)
        try:
            others = self._fill_others()
            memory = self._device_slots(cache)
        except BaseException:
            source.close()
            raise
        queue = StagedTransfers(streams, memory.records, source, _NUM_STAGED, DISK_THREADS)
        sizes = self._sizes
        return others, _Tier(queue, memory, lambda: device_times(queue, *sizes))

    def _before_host(self, cache: ExpertCache, streams: Streams) -> tuple[dict[str, Tensor], _Tier]:
        host = torch.device("cpu")
        weights = ExpertWeights(self._spec, self._dtype, self._kernels, device=host)
        others = self._fill_all(weights.plain())
        weights.pack()
        arena, memory = weights.only_arena(), self._device_slots(cache)
        pinned = streams.pin(arena.records)
        first = {layer: index * arena.num_experts for index, layer in enumerate(arena.layers)}

        def record_of(layer: int, expert: int) -> Tensor:
            return pinned[first[self._layers[layer]] + expert]

        ahead = self._ahead(streams, record_of)
        queue = DeviceTransfers(streams, memory.records, record_of, ahead=ahead)
        tables = {index: arena.table(layer) for index, layer in enumerate(self._layers)}
        planner = None
        if self._config.experts.miss == "split":
            costs = split_costs(self._kernels, tables[0], memory.records, queue, streams)
            planner = MissPlanner("split", costs)
            logger.warning(
                "miss='split' on a GPU is not exact: the host rounds otherwise than the GPU does, "
                "and what runs where depends on what is resident"
            )
        beside, sizes = HostExperts(tables, planner, streams), self._sizes
        return others, _Tier(queue, memory, lambda: device_times(queue, *sizes), beside, ahead)

    def _ahead(self, streams: Streams, record_of: Callable[[int, int], Tensor]) -> ReadAhead | None:
        num_places = self._residency.stream_slots
        if not num_places:
            return None
        places = DeviceSlots(num_places, self._residency.slot_bytes, self._kernels.device)
        return ReadAhead(streams, places.records, record_of, len(self._layers))

    def _is_held_by_host(self) -> bool:
        """Return whether all records are to be in host memory: one kind, one rank, and room."""
        moes = [moe for layer in self._layers if (moe := self._spec.layers[layer].moe) is not None]
        if self._share is not None or len({moe.intermediate_size for moe in moes}) > 1:
            return False
        if self._config.experts.expert_store is not None:
            return False
        num_bytes = sum(moe.router.num_experts for moe in moes) * self._residency.slot_bytes
        return num_bytes <= _SHARE_OF_HOST * available_bytes()

    def _device_slots(self, cache: ExpertCache) -> DeviceSlots:
        num_slots, device = cache.shape.total_slots, self._kernels.device
        return DeviceSlots(num_slots, self._residency.slot_bytes, device)

    @property
    def _sizes(self) -> tuple[int, int]:
        return self._num_experts(0), self._residency.slot_bytes

    def _warn_of_split(self) -> None:
        if self._config.experts.miss == "split":
            logger.warning(
                "miss='split' has no effect: the experts that are missing are on disk, where "
                "nothing can run them"
            )

    def _store(self) -> ExpertStore:
        """Open the store of this model's experts, packed now if there is none as yet."""
        layout = store_layout(
            self._spec, self._dtype, self._kernels, self._model_hash(), self._numerics_id
        )
        path = store_path(self._store_folder(), self._folder.resolve().name, layout)
        with one_at_a_time(path.parent):  # ranks of one machine share the file
            store = open_or_pack(
                path, layout, self._spec, self._kernels, self._fill_experts(), self._on_progress
            )
        return store

    @property
    def _spare_slots(self) -> int:
        """How many experts more this rank may come to hold: those of a layer, while it changes."""
        options = self._config.ranks
        if self._share is None or options.rebalance is None:
            return 0
        held = self._share.most_held
        more = max(0, (options.rebalance_slots or held) - held)
        return held + more * len(self._layers)

    # -- parts -------------------------------------------------------------------------------------

    @property
    def _predictor_name(self) -> str:
        return self._config.experts.predictor

    def _predictor(self, cache: ExpertCache) -> Callable[[Gates], Predictor]:
        """Return what makes the predictor, once its name and its file were found to be right."""
        module = plugin.load("moe_serve.predictors", self._predictor_name)
        state = self._predictor_state()
        shape = PredictorShape(
            num_layers=cache.shape.num_layers,
            num_experts=cache.shape.num_experts,
            top_k=cache.top_k,
        )

        def build(gates: Gates) -> Predictor:
            predictor: Predictor = module.build(shape, state, gates)
            return predictor

        return build

    def _prefetcher(
        self,
        cache: ExpertCache,
        tier: _Tier,
        build_predictor: Callable[[Gates], Predictor],
        gates: Gates,
    ) -> Prefetcher | None:
        if self._config.experts.prefetch == "off":
            return None
        predictor = build_predictor(gates)
        link = tier.times()
        calibration = Calibration(MAX_DISTANCE)
        kind = self._config.experts.prefetch
        return Prefetcher(predictor, cache, tier.queue, calibration, link, kind)

    def _link_times(self, source: Source, memory: SlotMemory) -> LinkTimes:
        scratch = memory.records[0]
        load_s = least_s(lambda index: self._load(source, scratch, index, None))
        chunk_s = least_s(lambda index: self._load(source, scratch, index, CHUNK_BYTES))
        return LinkTimes(load_s=load_s, chunk_s=min(chunk_s, load_s))

    def _load(self, source: Source, scratch: Tensor, index: int, num_bytes: int | None) -> None:
        """Read an expert, or its first bytes, into a slot that nobody uses yet.

        A damaged one is read all the same: it is refused when somebody needs it.
        """
        expert = index % self._num_experts(0)
        record = scratch[: source.record_bytes(0)]
        end = min(num_bytes or record.shape[0], record.shape[0])
        source.read_chunk(0, expert, record, 0, end)
        if num_bytes is None:
            with contextlib.suppress(StoreError):
                source.verify(0, expert, record)

    def _miss_costs(self, table: ExpertTable, source: Source, scratch: Tensor) -> MissCosts:
        """Measure a copy, and an expert on one row and on several, with the real kernels.

        table: of experts in host memory.
        """
        fixed_s, row_s = expert_s(self._kernels.moe, table)
        return MissCosts(
            copy_s=least_s(lambda index: self._load(source, scratch, index, None)),
            host_s=fixed_s,
            host_row_s=row_s,
            device_s=fixed_s,
            device_row_s=row_s,
            is_one_processor=True,
        )

    def _tables(self, cache: ExpertCache, records: Tensor) -> dict[int, ExpertTable]:
        slots = torch.from_numpy(cache.slot_of_expert)  # the same memory
        tables = {}
        for index, layer in enumerate(self._layers):
            moe = self._spec.layers[layer].moe
            assert moe is not None
            tables[layer] = ExpertTable(
                records,
                slots[index, : moe.router.num_experts],
                torch.zeros(moe.router.num_experts, dtype=torch.int64, device=records.device),
                self._spec.hidden_size,
                moe.intermediate_size,
                self._dtype,
            )
        return tables

    def _recorder(self) -> RoutingRecorder | None:
        path = self._config.experts.record_trace
        if path is None or not self._layers:
            return None
        num_experts = max(self._num_experts(index) for index in range(len(self._layers)))
        return RoutingRecorder(
            self._own_file(Path(path)),
            list(self._layers),
            num_experts,
            self._residency.top_k,
            model_id_of(self._config, self._folder),
        )

    def _own_file(self, path: Path) -> Path:
        return path if self._share is None else self._share.own_file(path)

    def _gates(self, weights: Mapping[str, Tensor]) -> Gates:
        """Return the routers and the norms before them, for a predictor that asks them early."""
        routers = [layer.moe.router for layer in self._spec.layers if layer.moe is not None]
        is_softmax = routers[0].score in ("softmax", "softmax_after_top_k")

        def arrays(name: str) -> list[Array]:
            return [
                weights[f"layers.{layer}.{name}"].float().cpu().numpy() for layer in self._layers
            ]

        return Gates(
            router_weights=arrays("router"),
            norm_weights=arrays("mlp_norm"),
            norm_eps=self._spec.norm_eps,
            score="softmax" if is_softmax else "sigmoid",
        )

    def _predictor_state(self) -> dict[str, Array] | None:
        """Read what train-predictor wrote, if it is to be used. Raises TraceError."""
        path = self._config.experts.predictor_state
        if path is None:
            return None
        return read_state(Path(path), self._config.experts.predictor)

    def _num_experts(self, index: int) -> int:
        moe = self._spec.layers[self._layers[index]].moe
        assert moe is not None
        return moe.router.num_experts

    # -- weights -----------------------------------------------------------------------------------

    def _fill_all(self, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load everything, the experts into `into`; return what is no expert's."""
        if self._is_dummy:
            weights = dummy_weights(self._spec, self._dtype, device=self._device, into=into)
        else:
            weights = load_weights(
                self._folder, self._spec, self._dtype, self._device, self._on_progress, into
            )
        return {name: tensor for name, tensor in weights.items() if name not in into}

    def _fill_others(self) -> dict[str, Tensor]:
        names = names_without_experts(self._spec)
        if self._is_dummy:
            return dummy_weights(self._spec, self._dtype, device=self._device, names=names)
        return load_weights(self._folder, self._spec, self._dtype, self._device, names=names)

    def _fill_experts(self) -> FillExperts:
        if self._is_dummy:
            return lambda into, experts: fill_dummy_rows(self._spec, into, experts)
        return WeightReader.open(self._folder, self._spec).read

    def _model_hash(self) -> str:
        return _hash_of(self._config, self._folder, counts_time=True)

    def _store_folder(self) -> Path:
        given = self._config.experts.expert_store
        return default_store_folder() if given is None else Path(given)


def read_usage(
    config: EngineConfig, spec: ModelSpec, folder: Path, share: Share | None = None
) -> ProfileKeeper | None:
    """Read the usage profile, if there is to be one. Raises TraceError for another model's."""
    path, layers = config.experts.usage_profile, moe_layers(spec)
    if path is None or not layers:
        return None
    counts = [moe.router.num_experts for layer in spec.layers if (moe := layer.moe) is not None]
    own = Path(path) if share is None else share.own_file(Path(path))
    before = read_profile(own, model_id_of(config, folder), len(layers), max(counts))
    return ProfileKeeper(own, before, config.experts.eviction)


def model_id_of(config: EngineConfig, folder: Path) -> str:
    """Return what traces, profiles and placements call this model."""
    return _hash_of(config, folder, counts_time=False)[:16]


def _hash_of(config: EngineConfig, folder: Path, *, counts_time: bool) -> str:
    is_dummy = config.weights.load_format == "dummy"
    return dummy_hash(folder) if is_dummy else model_hash(folder, counts_time=counts_time)


def default_store_folder() -> Path:
    """Return where packed experts are kept: moe_serve/experts in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    if not cache or not Path(cache).is_absolute():
        try:
            cache = str(Path.home() / ".cache")
        except RuntimeError as error:
            raise ConfigError("there is no home folder; give expert_store") from error
    return Path(cache) / "moe_serve" / "experts"
