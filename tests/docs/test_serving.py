"""The tables of docs/serving.md, compared with what they are about."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from moe_serve.launch.serve import RANK_FAILURE, STOPPED
from moe_serve.server.bodies import (
    AbortBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
)
from moe_serve.server.guard import ROUTES
from moe_serve.server.limits import Limits
from moe_serve.server.metrics import PREFIX, Metrics
from moe_serve.server.options import NetworkConfig, ServiceConfig
from moe_serve.text.chat_template import MAX_RENDER_S
from moe_serve.text.openai_form import OWN_FIELDS, SAMPLING_FIELDS, SERVER_FIELDS
from tests.server.test_metrics import (
    metrics,  # noqa: F401  # a fixture
    told_all,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL_BODIES: dict[str, type[BaseModel]] = {
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/abort": AbortBody,
}
TEXT = (ROOT / "docs" / "serving.md").read_text()


def section(heading: str) -> str:
    """Return what is under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None, heading
    return found[1]


def rows(heading: str) -> list[list[str]]:
    """Return the cells of each row of a section's table, without its head."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(cells) > 2, heading
    return cells[2:]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_limits() -> None:
    told = {names(row[0])[0]: row[1] for row in rows("Limits")}
    assert told == {one.name: f"{one.default:,g}" if isinstance(one.default, float)
                    else f"{one.default:,}" for one in dataclasses.fields(Limits)}  # fmt: skip


def test_the_time_of_a_template_is_kept() -> None:
    assert Limits().template_s == MAX_RENDER_S


def test_metrics(metrics: Metrics) -> None:  # noqa: F811
    told_all(metrics)
    text = metrics.exposition()[0].decode()
    found = []
    for about, name, kind in re.findall(r"^# HELP \S+ (.*)\n# TYPE (\S+) (\w+)$", text, re.M):
        labels: set[str] = set()
        for given in re.findall(rf"^{name}(?:_bucket)?\{{(.*)\}} ", text, re.MULTILINE):
            labels |= set(re.findall(r'(\w+)="', given))
        assert "model_name" in labels
        labels -= {"model_name", "le"}
        shown = ", ".join(f"`{label}`" for label in sorted(labels))
        found.append([f"`{name.removeprefix(PREFIX)}`", kind, shown, about])
    assert rows("Metrics") == found


def fields_of(heading: str) -> set[str]:
    listed = [name for row in rows(heading) for name in names(row[0])]
    assert len(listed) == len(set(listed)), "a field is there twice"
    return set(listed)


def test_fields_of_bodies() -> None:
    common = fields_of("Fields of both")
    assert common == set(GenerationBody.model_fields)
    bodies: dict[str, type[BaseModel]] = {"completion": CompletionBody, "chat": ChatBody}
    for kind, known in OWN_FIELDS.items():
        own = fields_of({"completion": "Completions alone", "chat": "Chats alone"}[kind])
        assert common | own == set(bodies[kind].model_fields)
        assert common | own == SAMPLING_FIELDS | known | SERVER_FIELDS
        assert not common & own


def test_routes() -> None:
    told = {}
    for row in rows("Routes"):
        for named in names(row[0]):
            method, _, path = named.partition(" ")
            told[path.replace("NAME", "{model:path}")] = (method, row[1])
    parts = {path for path in ROUTES if path.startswith("/dashboard/")} - {"/dashboard/data"}
    assert set(told) == set(ROUTES) - parts
    for path, (method, key) in told.items():
        known = ROUTES[path]
        assert key == ("no" if known.access == "open" else "yes"), path
        is_post = known.generates or path in SMALL_BODIES
        assert method == ("POST" if is_post else "GET"), path


def test_small_bodies() -> None:
    told = {row[0]: set(names(row[2])) for row in rows("Routes")}
    for path, body in SMALL_BODIES.items():
        assert told[f"`POST {path}`"] == set(body.model_fields), path


def codes_in_source() -> set[str]:
    """Return every code of an error that anything in server/ may answer with."""
    found: set[str] = set()
    for path in (ROOT / "moe_serve" / "server").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "invalid":
                found |= {d.value for d in node.args.defaults if isinstance(d, ast.Constant)
                          and isinstance(d.value, str)}  # fmt: skip
            if not isinstance(node, ast.Call):
                continue
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            if ast.unparse(node.func) in ("Refusal", "invalid"):
                given += node.args[2:3]
            found |= {c.value for c in given if isinstance(c, ast.Constant)
                      and isinstance(c.value, str)}  # fmt: skip
    return found


def test_codes_of_errors() -> None:
    told = {name for row in rows("Errors") for name in names(row[2])}
    assert told == codes_in_source()


def test_exit_codes() -> None:
    assert [row[0] for row in rows("Shutdown")] == ["0", "2", "3", str(RANK_FAILURE), str(STOPPED)]


def test_options_are_those_of_the_command() -> None:
    told = set(re.findall(r"`--([a-z-]+)", TEXT)) - OF_TORCHRUN
    help_text = subprocess.run(
        [sys.executable, "-m", "moe_serve", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    ).stdout
    assert told <= set(re.findall(r"--([a-z-]+)", help_text))
    own = {f.name for part in (NetworkConfig, ServiceConfig) for f in dataclasses.fields(part)}
    assert {name.replace("_", "-") for name in own} <= told


OF_TORCHRUN = {"max-restarts", "nnodes", "node-rank", "standalone", "rdzv-backend"}


@pytest.mark.parametrize("name", ["MOE_SERVE_API_KEY", "GLOO_SOCKET_IFNAME", "MASTER_PORT"])
def test_variables_are_named(name: str) -> None:
    assert name in TEXT
