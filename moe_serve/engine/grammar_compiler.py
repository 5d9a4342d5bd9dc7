"""From the text of a grammar to a matcher, by llguidance; and the process in which that is tried.

What a user sends may take minutes, gigabytes or a whole stack to compile, whatever limits the
library has. So each is tried first in a process of its own (`python -m
moe_serve.engine.grammar_compiler`), which can be killed; what went well there is compiled here.

Nothing here knows of requests. This module is light: it imports no torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np

if TYPE_CHECKING:
    import llguidance

TOKENIZER_FILE = "tokenizer.json"
# The library's own bounds. A schema of a dozen properties with formats, patterns and references
# needs 50,000 of the first and 10,000 of the second, of which 20,000 are some 10 ms of a mask, and
# 500 states; a text of at most so many characters needs some 6 to 30 states for each, of 0.4 KB. A
# property that may be left out is 4 items of a row; 1,000 in a row are up to 60 ms of a mask.
INITIAL_LEXER_FUEL = 400_000
STEP_LEXER_FUEL = 20_000
STEP_MAX_ITEMS = 10_000
MAX_ITEMS_IN_ROW = 1000
MAX_LEXER_STATES = 50_000
MAX_GRAMMAR_SIZE = 200_000
# Without a bound on it a small model may write nothing but white space for ever.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"
# The trial's stack is half of what threads have at least: what passes there has room everywhere.
TRIAL_STACK_BYTES = 4 * 2**20
# more than the trial's process has before it
TRIAL_MOST_BYTES = 512 * 2**20
TRIAL_TOKENS = 24
# of a matcher, where the C library does not say what was allocated: more than any of 60 hard ones
BYTES_PER_CHARACTER = 400
LEAST_BYTES = 2**18
_ERROR_CHARS = 300


class GrammarError(ValueError):
    """A grammar that cannot be used, and why."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Several threads may use it at once.

    num_ids: the bits of a mask that are tokens. end_id: the token by which the library itself says
    that a text may end: one of its own, where a tokenizer has room for that.
    """

    def __init__(self, path: Path) -> None:
        """path: a tokenizer.json. Raises GrammarError for one that cannot be used."""
        # optional, and some 90 ms: only those who use grammars need it
        import llguidance

        self._library = llguidance
        try:
            document = msgspec.json.decode(path.read_bytes())
            text, end_id = _with_end(document)
            added = document["added_tokens"] or []
            self._special = tuple(token["content"] for token in added if token.get("special"))
            self._tokenizer = llguidance.LLTokenizer(text, eos_token=end_id)
        except OSError as error:
            raise GrammarError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, KeyError) as error:
            raise GrammarError(
                f"grammars cannot be used with this model's tokenizer ({str(error)[:_ERROR_CHARS]})"
            ) from error
        self.num_ids = self._tokenizer.vocab_size
        self.end_id = self._tokenizer.eos_token
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=INITIAL_LEXER_FUEL,
            step_lexer_fuel=STEP_LEXER_FUEL,
            step_max_items=STEP_MAX_ITEMS,
            max_items_in_row=MAX_ITEMS_IN_ROW,
            max_lexer_states=MAX_LEXER_STATES,
            max_grammar_size=MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )

    def compile(self, kind: str, text: str) -> llguidance.LLMatcher:
        """Return a matcher at its start; kind and text as in `StructuredOutputs`.

        Nothing is shared with other matchers: what one builds up as it goes, and how it fails, is
        its own. (The library's deep_copy shares the lexer, with its counts and its errors.) Raises
        GrammarError, also for a text with a special token's name in it: the library would take the
        name for the token, which no text is.
        """
        library = self._library.LLMatcher
        if kind != "grammar":
            for name in self._special:
                if name in text:
                    raise GrammarError(f"{name!r:.100} is a special token, which is no text")
        try:
            match kind:
                case "json":
                    grammar = library.grammar_from_json_schema(
                        text, defaults={"whitespace_pattern": WHITESPACE}
                    )
                case "regex":
                    grammar = library.grammar_from_regex(text)
                case "choice":
                    words = (json.dumps(word, ensure_ascii=False) for word in json.loads(text))
                    grammar = library.grammar_from_lark("start: " + " | ".join(words))
                case _:
                    grammar = library.grammar_from_lark(text)
        except ValueError as error:
            raise GrammarError(str(error)[:_ERROR_CHARS]) from error
        matcher = library(self._tokenizer, grammar, log_level=0, limits=self._limits)
        check(matcher)
        return matcher


def is_installed() -> bool:
    return importlib.util.find_spec("llguidance") is not None


def check(matcher: llguidance.LLMatcher) -> None:
    """Raise GrammarError if a matcher has failed; it stays so."""
    if matcher.is_error():
        said = matcher.get_error().partition("<non-verbose/>")[0].strip()
        if said == "NoExtensionBias":
            said = "no text can satisfy it"
        raise GrammarError(said[:_ERROR_CHARS])


def allowed_ids(matcher: llguidance.LLMatcher, num_ids: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which tokens may follow, bool [num_ids]. Raises GrammarError."""
    words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    check(matcher)
    return np.unpackbits(words, count=num_ids, bitorder="little").view(np.bool_)


def _with_end(document: Any) -> tuple[str, int | None]:
    """Return a tokenizer.json with a token more, which stands for the end, and that token's id.

    So no token of the model has a second meaning. None: its ids have gaps, and none can be added;
    the library then takes one of its own choice.
    """
    added = document.setdefault("added_tokens", None) or []
    vocabulary = document["model"]["vocab"]
    ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    ids |= {token["id"] for token in added}
    end_id = len(ids)
    if max(ids, default=-1) + 1 != end_id:
        return msgspec.json.encode(document).decode(), None
    end = {
        "id": end_id, "content": "<|end of structured output|>", "single_word": False,
        "lstrip": False, "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip
    document["added_tokens"] = [*added, end]
    return msgspec.json.encode(document).decode(), end_id


# -- the trial's process ---------------------------------------------------------------------------


def trial(compiler: GrammarCompiler, kind: str, text: str) -> dict[str, Any]:
    """Compile a grammar, and walk some tokens at random; say how that went.

    "error": why not, or "bytes": what its matcher holds, and "compile_s".
    """
    before = _heap_bytes()
    start_s = time.perf_counter()
    try:
        matcher = compiler.compile(kind, text)
        compile_s = time.perf_counter() - start_s
        choose = random.Random(0)
        for _ in range(TRIAL_TOKENS):
            allowed = allowed_ids(matcher, compiler.num_ids)
            allowed[compiler.end_id] = False
            ids = allowed.nonzero()[0]
            if not len(ids) and not matcher.is_accepting():
                raise GrammarError("no text can satisfy it")
            if not len(ids):
                break
            matcher.consume_token(int(choose.choice(ids.tolist())))
            check(matcher)
            if matcher.is_stopped():
                break
    except GrammarError as error:
        return {"error": str(error)}
    after = _heap_bytes()
    if before is None or after is None:
        num_bytes = LEAST_BYTES + BYTES_PER_CHARACTER * len(text)
    else:
        num_bytes = max(LEAST_BYTES, after - before)
    return {"bytes": num_bytes, "compile_s": compile_s}


def main(path: Path, limit_s: float) -> int:
    """Try the grammars that come on stdin, a JSON object in a line; answer each with a line.

    The first line says whether the tokenizer can be used. Ends when stdin does, and by a signal
    when one takes longer than limit_s.
    """
    try:
        compiler = GrammarCompiler(path)
    except (GrammarError, ImportError) as error:
        _say({"error": str(error)})
        return 1
    _limit_memory()
    threading.stack_size(TRIAL_STACK_BYTES)
    _say({})
    while line := sys.stdin.buffer.readline():
        asked = msgspec.json.decode(line)
        # its default action, which needs nothing of Python's: the process ends at once
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        answer: dict[str, Any] = {}

        def tried(asked: Any = asked, answer: dict[str, Any] = answer) -> None:
            answer.update(trial(compiler, asked["kind"], asked["text"]))

        thread = threading.Thread(target=tried)
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(answer or {"error": "it cannot be compiled"})
    return 0


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


def _limit_memory() -> None:
    """Let this process have TRIAL_MOST_BYTES more; what asks for more ends it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + TRIAL_MOST_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _heap_bytes() -> int | None:
    """Return how many bytes this process has allocated; None where the C library does not tell."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
