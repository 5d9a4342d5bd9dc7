"""The verbs of studies: record routing, replay it, train predictors. See `moe_serve.study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_serve.errors import ConfigError
from moe_serve.verbs import (
    AsJson,
    Limit,
    PromptFile,
    Prompts,
    PromptSource,
    app,
    load,
    note,
    print_json,
    show_run,
    verb_of,
)

TraceFile = Annotated[Path, typer.Argument(metavar="TRACE.npz")]


@verb_of(app)
def trace(
    target: Annotated[Path, typer.Argument(metavar="OUT.npz")],
    prompt: Prompts = None,
    prompts: PromptFile = None,
    limit: Limit = None,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Continue prompts, and record which experts every token used, step by step."""
    if "record_trace" in engine:
        raise ConfigError("--record-trace and OUT.npz both name the file; give OUT.npz alone")
    given = PromptSource.read(prompt, prompts, limit)
    llm, params = load({**engine, "record_trace": str(target)}, sampling, None)
    if all(layer.moe is None for layer in llm.engine.spec.layers):
        raise ConfigError(f"{llm.model} is dense: it has no experts, so no routing to record")
    outputs = llm.generate(given.prompts(llm), params, priority=given.priorities)
    show_run(llm, outputs)
    note(f"the experts of every token are in {target}")


@verb_of(app)
def simulate(
    source: TraceFile,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            help="A file in experts/policies; again for more. "
            "[default: lru, lfu, lfru, heat, adaptive, belady]",
        ),
    ] = None,
    predictor: Annotated[
        list[str] | None,
        typer.Option(
            "--predictor",
            help="A file in predictors, to be judged; again for more. [default: none]",
        ),
    ] = None,
    slots: Annotated[
        list[int] | None,
        typer.Option(
            "--slots",
            help="Slots of each layer; again for more. [default: 14 to 75 % of the experts]",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", help="Sequences at once; again for more. [default: 1, 8]"),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="layer, shared or global; again for more. [default: layer]"),
    ] = None,
    split: Annotated[str, typer.Option(help="all, prequential, in-domain or transfer.")] = "all",
    learn_from: Annotated[
        Path | None, typer.Option(help="The trace that is learned from, for split transfer.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many sequences.")
    ] = None,
    as_recorded: Annotated[
        bool, typer.Option("--as-recorded", help="The steps that were recorded, not --batch.")
    ] = False,
    keep_template: Annotated[
        bool,
        typer.Option(help="Keep the leading tokens that all sequences share, or drop them."),
    ] = True,
    record_bytes: Annotated[int, typer.Option(help="Bytes of one expert, for bytes a token.")] = 0,
    layer_ms: Annotated[
        float | None,
        typer.Option(help="Time of one layer of a step, for the virtual clock."),
    ] = None,
    link_gb_s: Annotated[
        float | None,
        typer.Option(help="Rate at which experts come in, GB/s, for the virtual clock."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for plots (needs the study extra).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a trace through the cache that serves, beside the best that any policy could do."""
    from moe_serve.experts.trace import read_trace  # imports numpy
    from moe_serve.study.plots import check_available, write_plots
    from moe_serve.study.simulate import SimulateOptions
    from moe_serve.study.simulate import simulate as run
    from moe_serve.study.tables import tables

    given = {
        "policies": tuple(policy or ()),
        "slots": tuple(slots or ()),
        "batches": tuple(batch or ()),
        "scopes": tuple(scope or ()),
    }
    options = SimulateOptions(
        **{name: value for name, value in given.items() if value},  # type: ignore[arg-type]
        split=split,
        as_recorded=as_recorded,
        learn_from=None if learn_from is None else read_trace(learn_from),
        keep_template=keep_template,
        sequences=limit,
        record_bytes=record_bytes,
        predictors=tuple(predictor or ()),
        layer_s=None if layer_ms is None else layer_ms / 1e3,
        link_bytes_s=None if link_gb_s is None else link_gb_s * 1e9,
    )
    if plots is not None:
        check_available()
    recorded = read_trace(source)
    result = run(recorded, options, progress=note)
    if plots is not None:
        for path in write_plots(result, recorded, plots):
            note(f"wrote {path}")
    if as_json:
        print_json(result)
    else:
        print(tables(result))


@verb_of(app)
def place(
    source: TraceFile,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Processes to spread experts over.")],
    target: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Where the first --strategy's placement goes, as JSON."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Hosts, as many ranks on each.")] = 1,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", help="A file in experts/placement; again for more."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option("--slots", min=1, help="Of a layer on a rank; room for replicas."),
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            "--export",
            help="FORMAT:FILE, the same as another system reads it (a file in "
            "experts/placement_formats); again for more.",
        ),
    ] = None,
    given: Annotated[
        Path | None, typer.Option(help="A placement to judge as well, ours or another system's.")
    ] = None,
    other: Annotated[
        Path | None, typer.Option("--other", help="A trace of another task, to judge on as well.")
    ] = None,
    balance: Annotated[
        float, typer.Option(help="What even loads count beside traffic, for joint.")
    ] = 3.0,
    most_imbalance: Annotated[
        float, typer.Option(help="No rank above 1 + this times the mean load, for joint.")
    ] = 0.05,
    groups: Annotated[int, typer.Option(help="Groups that stay on one node, for eplb.")] = 0,
    bias: Annotated[int, typer.Option(help="Hottest experts that go everywhere, for eplb.")] = 0,
    hidden_size: Annotated[int, typer.Option(help="Of the model, for bytes a token.")] = 2048,
    topology: Annotated[
        Path | None,
        typer.Option(help="JSON: rank_gb_per_s, node_gb_per_s, latency_us, expert_us."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for plots (needs the study extra).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Spread a model's experts over ranks by a trace, and judge it on what was not learned from."""
    from moe_serve.experts.output_file import output_path
    from moe_serve.experts.placement.base import Mesh, PlacementOptions
    from moe_serve.experts.placement_file import (
        export_placement,
        parse_export,
        read_placement,
        write_placement,
    )
    from moe_serve.experts.trace import read_trace  # imports numpy
    from moe_serve.study import place as study
    from moe_serve.study.judge import read_topology
    from moe_serve.study.place_plots import write_plots
    from moe_serve.study.plots import check_available
    from moe_serve.study.tables import table

    if ranks % nodes:
        raise ConfigError(f"{ranks} ranks cannot be shared evenly by {nodes} nodes")
    if plots is not None:
        check_available()
    exports = [parse_export(text) for text in export or ()]
    for path in (target, *(path for _, path in exports)):
        if path is not None:
            output_path(path)
    strategies = tuple(strategy or ("joint",))
    recorded = read_trace(source)
    mesh = Mesh(num_ranks=ranks, ranks_per_node=ranks // nodes)
    layer_ids = recorded.layer_ids.tolist()
    if given is None:
        known = None
    else:
        known = read_placement(given, mesh, num_experts=recorded.num_experts, layer_ids=layer_ids)
    options = study.PlaceOptions(
        mesh=mesh,
        strategies=strategies,
        slots_per_rank=slots,
        other=None if other is None else read_trace(other),
        given=known,
        hidden_size=hidden_size,
        topology=read_topology(topology),
        placement=PlacementOptions(
            balance=balance, most_imbalance=most_imbalance, groups=groups, bias=bias
        ),
    )
    placed = study.place(recorded, options, progress=note)
    if target is not None:
        write_placement(target, placed[strategies[0]].placement)
        note(f"{target} has the placement of {strategies[0]}")
    for name, path in exports:
        export_placement(path, name, placed[strategies[0]].placement, layer_ids)
        note(f"{path} has it as {name} reads it")
    if plots is not None:
        for path in write_plots(placed, study.pareto(recorded, options), plots):
            note(f"wrote {path}")
    for line in study.notes(list(placed)):
        note(line)
    if as_json:
        print_json(study.as_json(recorded, options, placed))
        return
    bound = study.least_ranks_per_token(recorded, options)
    title = (
        f"trace {recorded.name}, {ranks} ranks on {nodes} nodes; ranks/token at least {bound:.3f}"
    )
    print(table(title, study.HEAD, study.table_rows(placed)))


@verb_of(app)
def train_predictor(
    source: TraceFile,
    target: Annotated[Path, typer.Argument(metavar="OUT.safetensors")],
    predictor: Annotated[str, typer.Option("--predictor", help="A file in predictors.")],
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="How often it sees the trace. [default: its own]"),
    ] = None,
) -> None:
    """Train a predictor on a trace, for --predictor-state to start from."""
    from moe_serve.experts.predictor_state import write_state  # imports numpy
    from moe_serve.experts.trace import read_trace
    from moe_serve.study.prediction import trained_state

    recorded = read_trace(source)
    state = trained_state(predictor, recorded, epochs)
    if not state:
        raise ConfigError(
            f"{predictor} keeps nothing for a later run; it needs no training, so leave "
            f"--predictor-state out"
        )
    write_state(target, predictor, state)
    size = sum(array.nbytes for array in state.values())
    note(
        f"{target} has what {predictor} learned of {recorded.num_tokens} tokens ({size} bytes); "
        f"use it with --predictor {predictor} --predictor-state {target}"
    )
