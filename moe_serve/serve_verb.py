"""The verb `serve`: an OpenAI server of one model, on one machine or on torchrun's ranks."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from moe_serve.config import EngineConfig, option_fields, resolve_options
from moe_serve.errors import ConfigError
from moe_serve.server.options import ServerConfig
from moe_serve.verbs import TemplateFile, app, note, verb_of

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", show_default=False, help="As --model: a folder, a hub name."),
]


@verb_of(app)
def serve(
    served: Model = None,
    chat_template: TemplateFile = None,
    *,
    server: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Answer OpenAI's API over HTTP until SIGTERM; docs/serving.md says what it answers."""
    from moe_serve.server.guard import check_binding

    config, server_config, is_seeded = _configs(served, engine, server)
    network = server_config.network
    check_binding(network.host, network.keys)

    with _ended_by_signals():
        import moe_serve
        from moe_serve.hub import resolve_model
        from moe_serve.launch.serve import STOPPED  # imports torch
        from moe_serve.launch.serve import serve as run
        from moe_serve.server.front_end import FrontOptions
        from moe_serve.text.chat_template import read_chat_template

        logging.getLogger("moe_serve").setLevel(logging.INFO)
        folder = resolve_model(config.weights.model, config.weights.revision)
        tokenizer = config.weights.tokenizer
        template = None if chat_template is None else chat_template.absolute()
        if template is not None:
            read_chat_template(template)
        options = FrontOptions(
            model=str(folder.absolute()),
            version=moe_serve.__version__,
            name=network.served_model_name or config.weights.model,
            tokenizer=None if tokenizer is None else str(resolve_model(tokenizer).absolute()),
            chat_template=None if template is None else str(template),
            server=server_config.options(),
            seed=config.runtime.seed if is_seeded else None,
        )
        code = run(config, server_config, options, _announce)
    if code == STOPPED:  # at once: the interpreter's own end takes its time with what is loaded
        os._exit(code)
    if code:
        raise typer.Exit(code)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals end this process, well, while there is nothing that would have to be ended."""

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(address: str) -> None:
    note(f"serving at {address} (dashboard: {address}/dashboard)")


def _configs(
    model: str | None, engine: Mapping[str, Any], server: Mapping[str, Any]
) -> tuple[EngineConfig, ServerConfig, bool]:
    """Return the engine's options and the server's, and whether a seed was given.

    A name is that of an option of one of both.
    """
    flags: dict[str, Any] = {**engine, **server}
    file: Path | None = flags.pop("config", None)
    if model is not None:
        if flags.get("model") not in (None, model):
            raise ConfigError(f"the model is named twice: {model} and --model {flags['model']}")
        flags["model"] = model
    options = resolve_options(flags, file=file, trees=(EngineConfig, ServerConfig))
    of_server = {leaf.name for leaf in option_fields(ServerConfig)}
    return (
        EngineConfig.from_options({k: v for k, v in options.items() if k not in of_server}),
        ServerConfig.from_options({k: v for k, v in options.items() if k in of_server}),
        "seed" in options,
    )
