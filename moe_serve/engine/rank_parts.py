"""What an engine has besides its own, when it is one of several: made in the order of its start."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moe_serve import plugin
from moe_serve.comm import auto
from moe_serve.comm._layout import Layout
from moe_serve.comm._rehearsal import Rehearsal, Spread
from moe_serve.comm._world import World
from moe_serve.comm.base import Dispatcher, Inbox, Receipt
from moe_serve.config import EngineConfig, changed
from moe_serve.engine.ranks import Ranks, share_of
from moe_serve.engine.residency import Residency
from moe_serve.errors import CommError, ConfigError
from moe_serve.experts.executor import Experts, ResidentExperts
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.placement_file import as_json
from moe_serve.experts.rank_experts import RankExperts
from moe_serve.kernels.suite import Kernels
from moe_serve.models.decoder import Decoder
from moe_serve.models.spec import ModelSpec
from moe_serve.types import Routing

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 16
# step, generation, epoch of the placement, tokens; what must be alike
_HEADER = struct.Struct(f"<QQQQ{_DIGEST_BYTES}s")
_FIELDS = ("step", "generation", "placement epoch", "tokens", "model, numerics or options")
_TOKENS = _FIELDS.index("tokens")


class StepHeader:
    """Tells all ranks what each brings to a step; where they are not of one mind, all raise."""

    def __init__(self, world: World, generation: int, alike: Mapping[str, str]) -> None:
        """alike: what must be the same on all ranks, by name."""
        self._world = world
        self._generation = generation
        text = "\n".join(f"{name}={alike[name]}" for name in sorted(alike))
        self._digest = hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]
        self._step = 0

    def share(self, epoch: int, num_tokens: int) -> list[int]:
        """Begin a step; return how many tokens each rank has. Raises CommError."""
        mine = _HEADER.pack(self._step, self._generation, epoch, num_tokens, self._digest)
        headers = [_HEADER.unpack(row) for row in self._world.share(mine)]
        for rank, header in enumerate(headers):
            for name, value, first in zip(_FIELDS, header, headers[0], strict=True):
                if name != "tokens" and value != first:
                    raise CommError(
                        f"ranks 0 and {rank} do not run the same step: {name} is {_shown(first)} "
                        f"and {_shown(value)}; start all ranks anew"
                    )
        self._step += 1
        return [int(header[_TOKENS]) for header in headers]


class Progress:
    """A dispatcher that remembers how far a step came. See `comm.base.Dispatcher`.

    done: the last layer that was combined; is_open: a layer was dispatched and not combined.
    """

    has_ranks = True

    def __init__(self, inner: Dispatcher, layout: Layout) -> None:
        self.inner = inner
        self.layout = layout
        self.done: int | None = None
        self.is_open = False
        self._layer = 0

    def begin_step(self, num_tokens: Sequence[int]) -> None:
        self.done, self.is_open = None, False
        self.inner.begin_step(num_tokens)

    def dispatch(
        self,
        layer: int,
        hidden: Tensor,
        routing: Routing,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[Inbox, Receipt]:
        self._layer, self.is_open = layer, True
        return self.inner.dispatch(layer, hidden, routing, meanwhile)

    def combine(
        self,
        outbox: Tensor,
        receipt: Receipt,
        shared: Tensor | None = None,
        shared_weights: Tensor | None = None,
    ) -> Tensor:
        combined = self.inner.combine(outbox, receipt, shared, shared_weights)
        self.done, self.is_open = self._layer, False
        return combined


class RankParts:
    """The parts of one rank, in the order in which they are made."""

    header: StepHeader

    def __init__(self, config: EngineConfig, spec: ModelSpec, ranks: Ranks, model_id: str) -> None:
        """Raises as `share_of`."""
        self.world: World = ranks.world
        self.num_here = ranks.num_here
        self._config = config
        self._ranks = ranks
        self._model_id = model_id
        self.share = share_of(config.ranks, spec, ranks.mesh, ranks.world.rank, model_id)
        self._progress: Progress | None = None

    @property
    def numerics_suffix(self) -> str:
        """What is added to the numerics' name where bits are not those of one process."""
        return "-partial" if self.share is not None and self._is_partial else ""

    def agree(self, numerics_id: str, residency: Residency) -> None:
        """Make sure, before anything is loaded, that all ranks are alike. Raises CommError."""
        placement = None if self.share is None else as_json(self.share.placement)
        options = self._config.options()
        del options["tokenizer"]  # a folder, which each machine may have elsewhere
        alike = {
            "model": self._model_id,
            "numerics_id": numerics_id,
            "options": json.dumps(options, sort_keys=True),
            "placement": hashlib.sha256(json.dumps(placement).encode()).hexdigest()[:16],
            "experts": "all in memory" if residency.shape is None else "behind a cache",
        }
        self._ranks.agree(alike)
        self.header = StepHeader(self.world, self._ranks.generation, alike)

    def experts(self, experts: Experts) -> Experts:
        """Return experts that serve other ranks, too."""
        if self.share is None:
            return experts
        assert isinstance(experts, ResidentExperts | OffloadedExperts)
        options = self._config.ranks
        is_noting = options.rebalance is not None or options.home == "affinity"
        return RankExperts(experts, is_noting)

    def dispatcher(self, kernels: Kernels) -> Progress | None:
        """Return what carries tokens to their experts; None of a dense model, which needs none."""
        share, mesh, name = self.share, self._ranks.mesh, self._config.ranks.dispatcher
        if name == "local":
            raise ConfigError("dispatcher 'local' is for one process; give another, or none")
        module = plugin.load("moe_serve.comm", name, "dispatcher")
        if not getattr(module, "IS_EXACT", True) and not self._is_partial:
            raise ConfigError(
                f"dispatcher {name!r} adds results up on their way, which gives other bits than "
                "one process; give combine='partial' if that may be"
            )
        if share is None:
            unused = [option for option in changed(self._config.ranks) if option != "ep_size"]
            if unused:
                logger.warning("the model is dense: no effect of %s", ", ".join(unused))
            return None
        layout = Layout(
            share.placement.ranks, mesh.num_ranks, mesh.ranks_per_node, share.layers, share.rank,
            self._config.ranks.replicas, kernels.device,
        )  # fmt: skip
        self._progress = Progress(self._built(self.world, layout, kernels), layout)
        return self._progress

    def _built(self, world: World, layout: Layout, kernels: Kernels) -> Dispatcher:
        module = plugin.load("moe_serve.comm", self._config.ranks.dispatcher, "dispatcher")
        options = {"with_sums": True} if self._is_partial and module is auto else {}
        dispatcher: Dispatcher = module.build(world, layout, kernels, **options)
        return dispatcher

    @property
    def _is_partial(self) -> bool:
        return self._config.ranks.combine == "partial"

    def rehearsals(self, kernels: Kernels) -> list[Dispatcher]:
        """Return dispatchers as steps will have them, each of which goes through a step alone."""
        if self._progress is None:
            return []
        layout = self._progress.layout
        world = Rehearsal(self.world.rank, self.world.size, self.world.device)
        whole = self._built(world, layout, kernels)
        parts = list(whole.candidates.values()) if isinstance(whole, auto.Auto) else [whole]
        return [Spread(part, layout) for part in parts]

    def meet(self, model: Decoder, top_k: int) -> None:
        """Wait for all ranks, and let them exchange something before the first request does.

        None waits in a collective, whose time is limited, for another's loading or compiling.
        """
        self._ranks.wait_for_all("ready")
        self.header.share(0, 0)
        self.world.connect()
        if self._progress is not None and isinstance(self._progress.inner, auto.Auto):
            hidden = torch.zeros(
                1, model.spec.hidden_size, dtype=model.dtype, device=model.kernels.device
            )
            self._progress.inner.fit(self._progress.layout.layers[0], hidden, top_k)
            self._progress.inner.forget_steps()
        self.world.forget()

    @property
    def about(self) -> str:
        """How the model is spread over ranks, in some words."""
        if self._progress is None:
            return "each with the whole model: it is dense"
        layout, options = self._progress.layout, self._config.ranks
        counts = [count for layer in layout.layers for count in layout.num_held(layer)]
        few, many = min(counts), max(counts)
        held = str(few) if few == many else f"{few} to {many}"
        return (
            f"{held} of {layout.num_experts} experts of each layer on a rank "
            f"({options.placement}), dispatcher {options.dispatcher}"
        )


def _shown(value: int | bytes) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
