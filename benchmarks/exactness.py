"""Are tokens and logprobs the same bits however a request was batched, cut, paged or interrupted?

Hypothesis: yes, for one model, dtype and numerics_id (docs/adr/0001). One factor at a time is
changed around a base, then random combinations; every output of every run is compared with the
base's, token by token and logprob by logprob, as exact floats.

    python -m benchmarks.exactness --prompts ../shared/data/prompts [--save] # all of it
    python -m benchmarks.exactness --prompts ... --num-prompts 12 --random 3 # a short one
    python -m benchmarks.exactness --prompts ... --kernels cpu --isa plain   # other kernels
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.expert_cases import Held, held_factors, random_held
from benchmarks.results import Row, recorded_command, write_results
from moe_serve.engine.engine import Engine
from moe_serve.hub import resolve_model
from moe_serve.llm import LLM
from moe_serve.types import RequestOutput, SamplingParams, StepOutput

# four layers as wide as a real model's: kernels differ at K >= 1024 that agree at K = 256
WIDE = {
    "model_type": "qwen3_moe",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 384,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
# what every base has in common with a real prompt set: an instruction that all prompts begin with
INSTRUCTION = "Answer the question as well as you can. Think first.\n\n"
MAX_PROMPT = 160


@dataclass(frozen=True, slots=True)
class Case:
    """One run: a name and the options in which it differs from the base. threads: torch's."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    threads: int = 2
    # forced preemption: KV for this many requests only, which begin short and grow long
    num_resident: int | None = None
    held: Held | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run gave, and proof that what it is named for took place."""

    outputs: list[tuple[Any, ...]]
    num_preemptions: int
    prefix_hit_tokens: int
    seconds: float
    experts: dict[str, Any] = field(default_factory=dict)


BASE = Case("base: 32 at once", {"max_num_seqs": 32, "enable_prefix_caching": False})
LAYER_BY_LAYER = Case("layer by layer", {"fused": False})
FACTORS = (
    Case("batch of 1", {"max_num_seqs": 1}),
    Case("chunk of 1", {"max_prefill_chunk": 1}),
    Case("chunk of 7", {"max_prefill_chunk": 7}),
    Case("chunk of 64", {"max_prefill_chunk": 64}),
    Case("blocks of 1", {"block_size": 1}),
    Case("blocks of 64", {"block_size": 64}),
    Case("prefix cache", {"enable_prefix_caching": True, "max_num_seqs": 4}),
    Case("1 thread", threads=1),
    Case("3 threads", threads=3),
    LAYER_BY_LAYER,
)
# admitted without room to grow, running sequences push each other out
PREEMPTION = Case("preemption", {"admission_horizon": 0, "block_size": 4}, num_resident=4)
# what a case with experts elsewhere shows to have taken place
EXPERT_COUNTS = ("misses", "computed_on_cpu", "useful", "late", "wasted")
# a full run must have forced more of them than this, on each model and dtype
MIN_PREEMPTIONS = 50
FULL_RANDOM = 30


def expert_cases(can_fuse: bool) -> Iterator[Case]:
    """Yield the cases in which not all experts are held, one factor at a time."""
    for name, options, held in held_factors():
        if can_fuse or "fused" not in options:
            yield Case(name, options, held=held)


def random_expert_cases(count: int, seed: int = 1) -> Iterator[Case]:
    """Yield combinations of all factors, experts' among them."""
    chance = random.Random(seed)
    for case in random_cases(count, seed):
        held = random_held(chance)
        text = ", ".join(f"{name}={value}" for name, value in held.options.items())
        name = f"{case.name}, {round(100 * held.share)} % held, {text}"
        yield replace(case, name=name + ", resized" * held.resizes, held=held)


def random_cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Yield combinations of all factors."""
    chance = random.Random(seed)
    for number in range(count):
        options = {
            "max_num_seqs": chance.choice([1, 2, 5, 17, 32]),
            "max_num_batched_tokens": chance.choice([8, 33, 100, 700, 2048]),
            "max_prefill_chunk": chance.choice([1, 3, 7, 16, 64, 100, None]),
            "block_size": chance.choice([1, 2, 5, 16, 33, 64]),
            "enable_prefix_caching": chance.random() < 0.5,
            "scheduling_policy": chance.choice(["fcfs", "decode_first", "shortest_prompt"]),
            "admission_horizon": chance.choice([0, 16]),
            "fused": chance.random() < 0.7,
        }
        text = ", ".join(f"{name}={value}" for name, value in options.items())
        resident = chance.choice([None, 2, 5])
        yield Case(f"random {number}: {text}", options, chance.choice([1, 2, 3]), resident)


@dataclass(frozen=True, slots=True)
class Numerics:
    """What may change bits: the model's dtype, and which kernels compute."""

    dtype: str
    kernels: str = "auto"
    isa: str = "auto"

    @property
    def can_fuse(self) -> bool:
        """Whether a forward pass is one call, so that there is another way to run it."""
        return self.kernels != "reference"

    @property
    def factors(self) -> tuple[Case, ...]:
        """What changes nothing, one at a time."""
        return tuple(case for case in FACTORS if self.can_fuse or case is not LAYER_BY_LAYER)

    def __str__(self) -> str:
        chosen = (self.kernels, self.isa)
        return " ".join([self.dtype, *(part for part in chosen if part != "auto")])


class Subject:
    """A model, its prompts, and the outputs they must have."""

    def __init__(
        self,
        model: str,
        numerics: Numerics,
        prompts: list[list[int]],
        max_tokens: int,
        load_format: str,
        store: Path | None = None,
    ) -> None:
        """store: folder of packed experts, for cases in which not all are held."""
        self.model = model
        self.numerics = numerics
        self.load_format = load_format
        self.max_tokens = max_tokens
        # each prompt greedily and with noise, side by side in one batch
        self.prompts = [ids for ids in prompts for _ in range(2)]
        self.params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=number,
                ignore_eos=True,
                logprobs=2,
            )
            for number in range(len(prompts))
            for temperature, top_p in ((0.0, 1.0), (0.8, 0.95))
        ]
        self.numerics_id = ""
        self.store = store
        config = json.loads((resolve_model(model, None) / "config.json").read_text())
        self.experts: tuple[int, int] = (config["num_experts"], config["num_experts_per_tok"])

    def run(self, case: Case) -> Outcome:
        """Build an engine with the case's options and run all prompts through it."""
        options = {**BASE.options, **asdict(self.numerics), **case.options}
        if not self.numerics.can_fuse:
            options.pop("fused", None)
        if case.num_resident is not None:
            longest = max(map(len, self.prompts)) + self.max_tokens
            block_size = options.get("block_size", 16)
            options["num_kv_blocks"] = case.num_resident * -(-longest // block_size)
        if case.held is not None:
            slots = case.held.slots(*self.experts)
            options |= {"expert_cache_slots": slots, "expert_store": str(self.store)}
            options |= case.held.options
        threads = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        try:
            with LLM(model=self.model, load_format=self.load_format, **options) as llm:
                if case.held is not None and case.held.resizes:
                    _resize_now_and_then(llm, *self.experts)
                start = time.perf_counter()
                outputs = llm.generate(self.prompts, self.params, use_tqdm=False)
                seconds = time.perf_counter() - start
        finally:
            torch.set_num_threads(threads)
        assert llm.last_run is not None
        self.numerics_id = llm.engine.numerics_id
        return Outcome(
            [_exact(output) for output in outputs],
            llm.last_run.num_preemptions,
            llm.last_run.prefix_hit_tokens,
            seconds,
            dict(llm.engine.stats().experts),
        )

    def first(self, count: int) -> Subject:
        """Return the same with its first `count` prompts only."""
        prompts = self.prompts[: 2 * count : 2]
        return Subject(
            self.model, self.numerics, prompts, self.max_tokens, self.load_format, self.store
        )

    def for_preemption(self, max_tokens: int = 64) -> Subject:
        """Return the same with short prompts and long outputs, which grow past any room."""
        prompts = [ids[-16:] for ids in self.prompts[::2]]
        return Subject(self.model, self.numerics, prompts, max_tokens, self.load_format, self.store)


def _resize_now_and_then(llm: LLM, num_experts: int, top_k: int) -> None:
    """Have the engine hold other numbers of experts, every third step."""
    engine = llm.engine
    assert isinstance(engine, Engine)
    step = engine.step
    sizes = itertools.cycle((top_k, num_experts // 2, num_experts, num_experts // 3 + top_k))
    numbers = itertools.count()

    def resized_step(move_bytes: int = 0) -> list[StepOutput]:
        if next(numbers) % 3 == 2:
            engine.resize_expert_cache(min(num_experts, next(sizes)))
        return step(move_bytes)

    engine.step = resized_step  # type: ignore[method-assign]


def _exact(output: RequestOutput) -> tuple[Any, ...]:
    """Return what must be equal: tokens, why it ended, and each logprob as its exact float."""
    (completion,) = output.outputs
    assert completion.logprobs is not None
    logprobs = tuple((p.token_id, p.logprob.hex(), p.rank, p.top) for p in completion.logprobs)
    return (completion.token_ids, completion.finish_reason, completion.error, logprobs)


def differing(outcome: Outcome, base: Outcome) -> list[int]:
    """List the requests whose outputs are not those of the base."""
    pairs = zip(outcome.outputs, base.outputs, strict=True)
    return [index for index, (got, want) in enumerate(pairs) if got != want]


def read_prompts(folder: Path, count: int) -> list[str]:
    """Take `count` prompts from the JSONL files of a folder, in turn."""
    files = [path.read_text().splitlines() for path in sorted(folder.glob("*.jsonl"))]
    if not files:
        raise SystemExit(f"{folder}: no .jsonl files")
    lines = itertools.chain.from_iterable(itertools.zip_longest(*files))
    texts = []
    for line in itertools.islice((line for line in lines if line), count):
        record = json.loads(line)
        texts.append(record.get("prompt") or record["messages"][0]["content"])
    return texts


def embedded_subject(
    numerics: Numerics, texts: Sequence[str], max_tokens: int, store: Path | None = None
) -> Subject:
    """Return the embedded model with real prompts; store: as for `Subject`."""
    from moe_serve.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model("demo-moe", None))
    assert tokenizer is not None
    prompts = [tokenizer.encode(INSTRUCTION + text)[:MAX_PROMPT] for text in texts]
    return Subject("demo-moe", numerics, prompts, max_tokens, "safetensors", store)


def wide_subject(numerics: Numerics, folder: Path, num_prompts: int, max_tokens: int) -> Subject:
    """Return the wide dummy with random prompts that share a beginning; writes its config."""
    (folder / "config.json").write_text(json.dumps(WIDE))
    chance = random.Random(0)
    shared = [chance.randrange(2048) for _ in range(40)]
    prompts = [
        shared + [chance.randrange(2048) for _ in range(chance.randint(1, 90))]
        for _ in range(num_prompts)
    ]
    return Subject(str(folder), numerics, prompts, max_tokens, "dummy", folder / "experts")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True, help="folder of .jsonl files")
    parser.add_argument("--num-prompts", type=int, default=100, help="for the embedded model")
    parser.add_argument("--num-wide", type=int, default=40, help="for the wide dummy")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--random", type=int, default=30, help="random combinations")
    parser.add_argument("--random-prompts", type=int, default=20, help="prompts of each of those")
    parser.add_argument(
        "--experts", action="store_true", help="the cases in which not all experts are held"
    )
    parser.add_argument("--kernels", default="auto", help="auto, cpu or reference")
    parser.add_argument("--isa", default="auto", help="instruction set of the native kernels")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    args = parser.parse_args()
    rows: list[Row] = []
    texts = read_prompts(args.prompts, args.num_prompts)
    numerics_ids = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            numerics = Numerics(dtype, args.kernels, args.isa)
            for name, subject in (
                (
                    "embedded",
                    embedded_subject(numerics, texts, args.max_tokens, Path(folder, "embedded")),
                ),
                ("wide", wide_subject(numerics, Path(folder), args.num_wide, args.max_tokens)),
            ):
                rows += run_matrix(
                    f"{name} {numerics}", subject, args.random, args.random_prompts, args.experts
                )
                numerics_ids.append(subject.numerics_id)
    num_wrong = sum(int(row.value) for row in rows if row.limit == 0)
    print(f"{num_wrong} outputs differ from their base")
    num_forced = fewest_forced(rows)
    print(f"at least {num_forced} preemptions were forced on each model and dtype")
    is_proof = args.random < FULL_RANDOM or args.experts or num_forced > MIN_PREEMPTIONS
    if not is_proof:
        print(f"that is too few to prove anything: a full run needs more than {MIN_PREEMPTIONS}")
    if args.save:
        command = recorded_command("benchmarks.exactness", sys.argv[1:])
        numerics_id = ", ".join(dict.fromkeys(numerics_ids))
        kind = "exactness-experts" if args.experts else "exactness"
        print(write_results(kind, rows, command=command, numerics_id=numerics_id))
    return 1 if num_wrong or not is_proof else 0


def fewest_forced(rows: Sequence[Row]) -> int:
    """Return the least number of preemptions that the case made for them forced on any model."""
    forced = [
        int(row.value) for row in rows if row.name.endswith(f"{PREEMPTION.name}: preemptions")
    ]
    return min(forced, default=0)


def run_matrix(
    name: str,
    subject: Subject,
    num_random: int,
    num_random_prompts: int,
    with_experts: bool = False,
) -> list[Row]:
    """Run the base, every factor and some combinations; print and return what differed.

    Factors run on all prompts; combinations, many of which are slow, on the first few.
    """
    print(f"{name}: {len(subject.prompts)} outputs a run")
    rows: list[Row] = []
    factors: Iterable[Case] = (*subject.numerics.factors, PREEMPTION)
    combinations = random_cases(num_random)
    if with_experts:
        factors = expert_cases(subject.numerics.can_fuse)
        combinations = random_expert_cases(num_random)
    for is_random, cases in ((False, factors), (True, combinations)):
        fixed = subject.first(num_random_prompts) if is_random else subject
        growing = fixed.for_preemption()
        bases = {fixed: fixed.run(BASE), growing: growing.run(BASE)}
        rows += _run_cases(name, cases, fixed, growing, bases)
    return rows


def _run_cases(
    name: str,
    cases: Iterable[Case],
    fixed: Subject,
    growing: Subject,
    bases: dict[Subject, Outcome],
) -> list[Row]:
    """Run cases, those with scarce KV on the growing subject, and compare with its base."""
    rows = []
    for case in cases:
        grows = case.num_resident is not None
        subject = growing if grows else fixed
        outcome = subject.run(case)
        wrong = differing(outcome, bases[subject])
        print(
            f"  {len(wrong):3d} differ {outcome.num_preemptions:5d} preemptions"
            f" {outcome.prefix_hit_tokens:6d} hit tokens"
            f" {outcome.experts.get('total', {}).get('misses', 0):7d} misses"
            f" {outcome.seconds:6.1f} s  {case.name}",
            flush=True,
        )
        label = f"{name}, {case.name}"
        rows.append(Row.of(f"{label}: outputs that differ", [len(wrong)], "count", limit=0))
        if grows:
            rows.append(Row.of(f"{label}: preemptions", [outcome.num_preemptions], "count"))
        for what in EXPERT_COUNTS:
            if outcome.experts.get("total", {}).get(what):
                count = outcome.experts["total"][what]
                rows.append(Row.of(f"{label}: {what}", [count], "count"))
        if outcome.prefix_hit_tokens:
            rows.append(Row.of(f"{label}: hit tokens", [outcome.prefix_hit_tokens], "count"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
