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
        typer.Option("--policy", help="A file in experts/policies; again for more."),
    ] = None,
    predictor: Annotated[
        list[str] | None,
        typer.Option("--predictor", help="A file in predictors, to be judged; again for more."),
    ] = None,
    slots: Annotated[
        list[int] | None, typer.Option("--slots", help="Slots of each layer; again for more.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Sequences at once; again for more.")
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="layer, shared or global; again for more.")
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
