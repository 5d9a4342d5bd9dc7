"""The verb `plan`: what fits where, and what to use. See `moe_serve.study.plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_serve.verbs import AsJson, app, config_of, note, print_json, printable, verb_of


@verb_of(app)
def plan(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or demo-moe.")],
    machine: Annotated[
        Path | None,
        typer.Option(
            "--machine",
            help="JSON: memory_gb, cores, memory_gb_per_s, gflop_per_s, disk_gb_per_s, "
            "network_gb_per_s, latency_us, step_us, num_machines; the rest is measured here.",
        ),
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option("--ranks", help="Processes; again for more. [default: 1, 2, 4, 8]"),
    ] = None,
    dispatcher: Annotated[
        list[str] | None,
        typer.Option(
            "--dispatcher",
            help="per_expert, dedup, all_gather or static; again for more. [default: all]",
        ),
    ] = None,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens of each output.")] = 128,
    num_seqs: Annotated[int, typer.Option(help="Prompts at once.")] = 8,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Recorded routing of the model (.npz).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, bfloat16, float32. [default: auto]")
    ] = None,
    as_json: AsJson = False,
    *,
    runtime: dict[str, Any],
) -> None:
    """Say what fits where, how fast it would be, and whether to spread experts over ranks.

    Reads config.json alone, no weights. Other options of the engine come from --config or the
    environment, as for the engine.
    """
    import torch

    from moe_serve.engine.build import dtype_of
    from moe_serve.experts.trace import read_trace
    from moe_serve.hub import resolve_config
    from moe_serve.kernels import suite
    from moe_serve.models.hf_config import HFConfig
    from moe_serve.models.registry import read_spec
    from moe_serve.study import plan_report
    from moe_serve.study.machine import find_machine
    from moe_serve.study.plan import Subject, Workload, make_plan
    from moe_serve.study.wire import DISPATCHERS

    given = {"model": model} | ({} if dtype is None else {"dtype": dtype})
    config = config_of({**runtime, **given})
    workload = Workload(input_len=input_len, output_len=output_len, num_seqs=num_seqs)
    hf_config = HFConfig.read(resolve_config(model, config.weights.revision))
    spec = read_spec(hf_config)
    found_dtype = dtype_of(config.weights.dtype, hf_config.dtype)
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)
    subject = Subject(
        config=config,
        spec=spec,
        dtype=found_dtype,
        kernels=suite.load(config.runtime.kernels, config.runtime.isa, config.runtime.numerics),
        machine=find_machine(machine, config, found_dtype),
        workload=workload,
        trace=None if trace is None else read_trace(trace),
    )
    progress = None if trace is None else note  # a replay takes a while
    made = make_plan(subject, tuple(ranks or ()), tuple(dispatcher or DISPATCHERS), progress)
    for line in plan_report.notes(subject, made):
        note(line)
    if as_json:
        print_json(plan_report.as_json(subject, made))
    else:
        for line in plan_report.text_of_plan(subject, made).splitlines():
            print(printable(line))
