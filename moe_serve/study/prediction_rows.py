"""What `moe-serve simulate --predictor` says of guesses: one row per predictor and distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moe_serve.experts.trace import Trace
from moe_serve.study.prediction import BREAK_EVEN, make_predictor, measure
from moe_serve.study.states import PredictorStates

EVICTION = "lfu"  # what is resident while guesses are judged
WARM_TOKENS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionRow:
    """One predictor at one distance, over the steps that began within a range of tokens.

    distance: how many layers ahead; 0: all layers, before the first one. recall: of the experts
    that an event used, those among as many of its most probable; recall_twice: among twice as many.
    issued: guesses of experts that are not resident, above the calibrated threshold for break_even;
    precision: the share of them that was used, None where none was issued; cover: the used ones
    over all misses. first_token, last_token: the range; last_token None: to the end. observe_us,
    predict_us: median time of one call each. held_bytes: arrays held after the run; state_bytes: of
    what is saved for a later one.
    """

    predictor: str
    split: str
    batch: int
    slots: int
    eviction: str
    break_even: float
    first_token: int
    last_token: int | None
    distance: int
    recall: float
    recall_twice: float
    issued: int
    precision: float | None
    cover: float
    observe_us: float
    predict_us: float
    held_bytes: int
    state_bytes: int


def prediction_rows(
    trace: Trace,
    states: PredictorStates,
    names: Sequence[str],
    split: str,
    batches: Sequence[int],
    slots: int,
    progress: Callable[[str], None],
) -> Iterator[PredictionRow]:
    """Run each predictor over `trace`, starting from what it learned for this split."""
    for name in names:
        for batch in batches:
            progress(f"guesses of {name}, {slots} slots, batch {batch}")
            predictor = make_predictor(name, trace, states.of(name))
            found = measure(predictor, trace, batch=batch, slots=slots, eviction=EVICTION)
            state_bytes = sum(array.nbytes for array in predictor.state().values())
            for first, last in _ranges(trace, split):
                for row in found.accuracy(first, last)[: trace.num_layers]:
                    yield PredictionRow(
                        predictor=name,
                        split=split,
                        batch=batch,
                        slots=slots,
                        eviction=EVICTION,
                        break_even=BREAK_EVEN,
                        first_token=first,
                        last_token=last,
                        distance=row.distance,
                        recall=row.recall,
                        recall_twice=row.recall_twice,
                        issued=row.issued,
                        precision=row.precision,
                        cover=row.cover,
                        observe_us=found.observe_us,
                        predict_us=found.predict_us,
                        held_bytes=found.held_bytes,
                        state_bytes=state_bytes,
                    )


def _ranges(trace: Trace, split: str) -> tuple[tuple[int, int | None], ...]:
    """Return the tokens to sum up: with a new task to learn, the beginning apart."""
    if split in ("prequential", "transfer") and trace.num_tokens > WARM_TOKENS:
        return ((0, WARM_TOKENS), (WARM_TOKENS, None))
    return ((0, None),)
