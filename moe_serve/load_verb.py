"""The verb `bench serve`: a load on any server of OpenAI's API. See `moe_serve.load`.

It imports no torch: it starts at once, and leaves the machine to the server.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_serve.verbs import (
    PROGRAM,
    SAMPLING_FLAGS,
    AsJson,
    Limit,
    PromptFile,
    bench,
    note,
    print_json,
    printable,
    verb_of,
)


def _option(flag: str, text: str, **more: Any) -> Any:
    return typer.Option(flag, help=text, show_default=False, **more)


SAMPLING_NAMES = frozenset(name for name, _, _ in SAMPLING_FLAGS)
Key = Annotated[
    str | None, _option("--api-key", "Sent as a bearer token.", envvar="OPENAI_API_KEY")
]


@verb_of(bench)
def serve(
    base_url: Annotated[
        str, typer.Option("--base-url", help="The server, http or https.")
    ] = "http://127.0.0.1:8000",
    api_key: Key = None,
    model: Annotated[
        str | None, _option("--model", "[default: the first that the server lists]")
    ] = None,
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="completions or chat.")
    ] = "completions",
    dataset: Annotated[
        str,
        typer.Option("--dataset", help="random (token ids), file (--prompts) or trace (--trace)."),
    ] = "random",
    input_len: Annotated[
        int | None, _option("--input-len", "random: tokens of each prompt. [default: 128]")
    ] = None,
    output_len: Annotated[
        int | None,
        _option("--output-len", "random, file: most output tokens. [default: 128]"),
    ] = None,
    range_ratio: Annotated[
        float | None,
        _option("--range-ratio", "random: lengths vary by this share of them. [default: 0]"),
    ] = None,
    vocab_size: Annotated[
        int | None, _option("--vocab-size", "random, trace: ids are below it. [default: 1000]")
    ] = None,
    first_token_id: Annotated[
        int | None, _option("--first-token-id", "random, trace: the lowest id. [default: 10]")
    ] = None,
    prompts: PromptFile = None,
    trace: Annotated[
        Path | None,
        _option("--trace", "CSV: TIMESTAMP, ContextTokens, GeneratedTokens; it sets arrivals too."),
    ] = None,
    time_scale: Annotated[
        float | None,
        _option("--time-scale", "trace: multiplies its times; 0.5: twice as fast. [default: 1]"),
    ] = None,
    max_len: Annotated[
        int | None, _option("--max-len", "trace: most tokens of prompt and output. [default: none]")
    ] = None,
    limit: Limit = None,
    request_rate: Annotated[
        float | None, _option("--request-rate", "Arrivals a second. [default: inf, all at once]")
    ] = None,
    burstiness: Annotated[
        float | None,
        _option("--burstiness", "Gamma shape of gaps; 1: Poisson; less: burstier. [default: 1]"),
    ] = None,
    burst_every: Annotated[
        float | None, _option("--burst-every", "Seconds between bursts, added to the rate.")
    ] = None,
    burst_size: Annotated[int | None, _option("--burst-size", "Requests of a burst.")] = None,
    max_concurrency: Annotated[
        int | None,
        _option("--max-concurrency", "Requests at once; without a rate: so many clients in turn."),
    ] = None,
    duration: Annotated[
        float | None, _option("--duration", "No arrivals after so many seconds.")
    ] = None,
    num_prompts: Annotated[
        int | None,
        _option("--num-prompts", "Requests. [default: 100, or the file's; none with --duration]"),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", help="A request fails after so many seconds.")
    ] = 600.0,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and arrivals.")] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for outputs of full length.")
    ] = False,
    temperature: Annotated[
        float | None, _option("--temperature", "0 is greedy. [default: the server's]")
    ] = None,
    extra_body: Annotated[
        str | None, _option("--extra-body", "A JSON object: more fields of every request.")
    ] = None,
    goodput: Annotated[
        list[str] | None,
        _option("--goodput", "ttft:MS, tpot:MS or e2e:MS; again for more: count who meets all."),
    ] = None,
    save_requests: Annotated[
        Path | None, _option("--save-requests", "Write each request's times, as JSON lines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a server of OpenAI's API under load: latencies, rates, goodput, failures.

    Latencies begin when a request was due, not when it was sent; --json has both.
    """
    flags = dict(locals())
    from moe_serve.load.figures import lines_of, notes_of
    from moe_serve.load.session import LoadOptions, measure

    given = {name: value for name, value in flags.items() if name != "as_json"}
    options = LoadOptions(**given)
    report = measure(options, without_key(sys.argv[1:]), SAMPLING_NAMES)
    if as_json:
        print_json(report)
    else:
        for line in lines_of(report):
            print(printable(line), flush=True)
    for line in notes_of(report):
        note(line)
    if report["is_interrupted"]:
        raise KeyboardInterrupt
    if not report["num_answered"]:
        raise typer.Exit(1)


def without_key(arguments: Sequence[str]) -> str:
    """Return the command as a report may keep it: without the value of --api-key."""
    shown = []
    is_key = False
    for argument in arguments:
        if is_key:
            argument = "..."
        elif argument.startswith("--api-key="):
            argument = "--api-key=..."
        is_key = argument == "--api-key"
        shown.append(argument)
    return shlex.join([PROGRAM, *shown])
