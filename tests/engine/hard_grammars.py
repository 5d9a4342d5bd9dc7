"""Grammars that are wrong, or made to take time, memory or a stack; each with what may come of it.

"error": it is refused. "any": it may be refused or run, within the limits.
"""

from __future__ import annotations

import json
from typing import Any


def nested_schema(depth: int) -> str:
    return '{"type":"object","properties":{"a":' * depth + '{"type":"string"}' + "}}" * depth


def chain(name: str, length: int) -> str:
    """Rules that each are the next one."""
    rules = "\n".join(f"{name}{i}: {name}{i + 1}" for i in range(length))
    return f'start: {name}0\n{rules}\n{name}{length}: "x"'


def doubled(name: str, depth: int) -> str:
    """A text of 2**depth letters."""
    rules = "\n".join(f"{name}{i}: {name}{i + 1} {name}{i + 1}" for i in range(depth))
    return f'start: {name}0\n{rules}\n{name}{depth}: "x"'


def schema(**keywords: Any) -> str:
    return json.dumps(keywords)


def properties(count: int, **of_each: Any) -> str:
    return schema(type="object", properties={f"p{i}": of_each for i in range(count)})


HARD: list[tuple[str, str, str]] = [
    # regular expressions
    ("regex", "(((", "error"),
    ("regex", "(?=a)b", "error"),
    ("regex", r"(a)\1", "error"),
    ("regex", r"[^\x00-\x{10FFFF}]", "error"),
    ("regex", "(" * 20_000 + "a" + ")" * 20_000, "error"),
    ("regex", "(a+)+b", "any"),
    ("regex", "(a{1,1000}){1,1000}b", "any"),
    ("regex", "((a{1,1000}){1,1000}){1,1000}", "any"),
    ("regex", "(((((a{0,100}){0,100}){0,100}){0,100}){0,100}){0,100}x", "any"),
    ("regex", "a{100000000}", "error"),
    ("regex", "(a|b)*a(a|b){2000}", "any"),
    ("regex", r"(\p{L}|\p{N}){1,1000}[^\p{Lu}]{1,1000}", "any"),
    ("regex", "|".join(f"w{i}x*" for i in range(6000)), "any"),
    ("regex", "a" * 65_000, "any"),
    ("regex", ".*" * 20_000, "error"),
    ("regex", "a?" * 30_000 + "a" * 2000, "error"),
    ("regex", "(.*x)" * 12_000, "any"),
    # schemas
    ("json", schema(type="strin"), "error"),
    ("json", '{"not": {"type": "string"}}', "error"),
    ("json", schema(type="string", format="nonsense"), "error"),
    ("json", '{"$ref": "http://127.0.0.1:9/schema.json"}', "error"),
    ("json", '{"$ref": "file:///etc/passwd"}', "error"),
    ("json", '{"$ref": "#"}', "error"),
    ("json", '{"type":"object","properties":{"a":false},"required":["a"]}', "error"),
    ("json", nested_schema(1000), "error"),
    ("json", nested_schema(30), "any"),
    ("json", schema(enum=[f"value number {i}" for i in range(2900)]), "any"),
    ("json", schema(enum=list(range(9000))), "any"),
    ("json", properties(2000, type="string"), "any"),
    ("json", schema(type="string", minLength=10**6, maxLength=2 * 10**6), "any"),
    ("json", schema(type="array", minItems=10**6, items={"type": "integer"}), "any"),
    ("json", schema(type="integer", multipleOf=999_999_937), "error"),
    ("json", schema(type="number", minimum=1e-300, maximum=1e300), "error"),
    ("json", schema(allOf=[{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrst"]), "error"),  # noqa: E501
    ("json", schema(allOf=[{"anyOf": [{"properties": {f"a{i}": {"const": k}}} for k in range(8)]} for i in range(12)]), "error"),  # noqa: E501
    ("json", properties(700, type="string", pattern="^(.*a.{20}|[b-z]{1,30})$"), "any"),
    # grammars
    ("grammar", "start: start", "error"),
    ("grammar", "start: foo", "error"),
    ("grammar", 'start: "a" (', "error"),
    ("grammar", 'root ::= "a"', "error"),
    ("grammar", "%import .etc.passwd\nstart: passwd", "error"),
    ("grammar", 'start: %json {"$ref": "http://127.0.0.1:9/"}', "error"),
    ("grammar", 'start: "a" B\nB: /c/ & /d/', "error"),
    ("grammar", "//" + "x" * 60_000, "error"),
    ("grammar", 'start: s\ns: s s s | s s | "a" | ""', "any"),
    ("grammar", "start: " + "(" * 15_000 + '"a"' + ")" * 15_000, "error"),
    ("grammar", doubled("a", 60), "any"),
    ("grammar", doubled("A", 60), "error"),
    ("grammar", 'start: "a"{1,100000000}', "any"),
    ("grammar", 'start: (("a"{1,1000}){1,1000}){1,1000}', "any"),
    ("grammar", chain("c", 3500), "error"),
    ("grammar", chain("C", 3500), "any"),
    ("grammar", "start: A\nA: " + " & ".join(f"/.*{chr(97 + i)}.*/" for i in range(20)), "error"),
]  # fmt: skip
