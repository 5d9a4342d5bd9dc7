"""An engine that outlives its processes: what is lost is started again, and no token with it.

Worlds of ranks come and go; this keeps the books. When a rank has died or frozen, the whole world
is ended and another one formed, and every unfinished request is given to it with the tokens that
were told of. Sampling is a function of the request and its tokens, so each goes on as if nothing
had been. What a lost world did in its last step was told to nobody, and is done again.

A request may itself be what ends worlds. Those that two worlds were lost with are let into the next
one by one: each must get a token further before the next comes, and the one with which a third
world is lost ends with an error. So the others are served, whatever one of them does.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from moe_serve.config import EngineConfig
from moe_serve.engine.engine import EngineStats
from moe_serve.errors import CommError, MoeServeError, RequestError
from moe_serve.experts.placement.base import Placement
from moe_serve.launch.coordinator import RankedEngine
from moe_serve.launch.links import RemoteLink
from moe_serve.models.spec import ModelSpec
from moe_serve.types import Request, StepOutput

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# worlds lost in so long count together
LOSSES_IN_S = 300.0
# a request that was under way so often may be the cause, and is tried alone; after one more it is
_SUSPECTED_AFTER = 2


@dataclasses.dataclass(slots=True)
class _Book:
    """A request, what each of its outputs was given (None: it has ended), and what it went through.

    is_in: the present world has it. num_losses: worlds that were lost while they had it, and since
    it was last tried. awaited: while it is tried, the outputs that are to get a token yet.
    """

    request: Request
    outputs: list[list[int] | None]
    is_in: bool = True
    num_losses: int = 0
    awaited: set[int] = dataclasses.field(default_factory=set)

    def rest(self) -> Request:
        outputs = tuple(None if tokens is None else tuple(tokens) for tokens in self.outputs)
        return dataclasses.replace(self.request, output_ids=outputs)


class LastingEngine:
    """As `RankedEngine`, for as long as worlds can be formed.

    open_world: forms one, of the generation given. max_losses: how many worlds may be lost within
    five minutes; the next one's end is raised. on_loss: told why, before another world is formed;
    on_world: after that.
    """

    def __init__(
        self,
        open_world: Callable[[int], RankedEngine],
        *,
        max_losses: int = 3,
        on_loss: Callable[[str], None] = lambda why: None,
        on_world: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_world = open_world
        self._max_losses = max_losses
        self._on_loss = on_loss
        self._on_world = on_world
        self._engine = open_world(0)
        self._books: dict[str, _Book] = {}
        self._suspects: list[_Book] = []  # that wait to be tried
        self._tried: _Book | None = None
        self._unsaid: list[StepOutput] = []
        self._losses_s: deque[float] = deque()
        self._is_stepping = self._is_closed = False
        self._placement: Placement | None = None
        self._slots_per_layer: int | None = None
        self.generation = 0
        self.num_resubmitted = 0

    # -- what is the same in every world -----------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        return self._engine.config

    @property
    def spec(self) -> ModelSpec:
        return self._engine.spec

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def numerics_id(self) -> str:
        return self._engine.numerics_id

    @property
    def about(self) -> str:
        return self._engine.about

    @property
    def is_moving(self) -> bool:
        return self._engine.is_moving

    @property
    def remote_links(self) -> list[RemoteLink]:
        return self._engine.remote_links

    @property
    def has_unfinished(self) -> bool:
        return bool(self._unsaid or self._suspects) or self._engine.has_unfinished

    # -- requests ----------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """As `Engine.add`."""
        if request.request_id in self._books:
            raise RequestError(
                f"request_id {request.request_id!r} is in use by an unfinished request; "
                "give another, or abort that one"
            )
        book = _Book(request, [list(tokens or ()) for tokens in _outputs_of(request)])
        for index, tokens in enumerate(request.output_ids):
            if tokens is None:
                book.outputs[index] = None
        self._books[request.request_id] = book
        try:
            self._engine.add(request)
        except CommError as error:
            self._form_anew(error)  # the new world has it already
        except MoeServeError:
            del self._books[request.request_id]
            raise

    def step(self) -> list[StepOutput]:
        """As `Engine.step`; [] after a world was lost. Raises CommError when no other is formed."""
        self.start_step()
        return self.finish_step()

    def start_step(self, for_s: float = 0.0) -> None:
        """Begin a step: `finish_step` must follow. See `RankedEngine.start_step`."""
        if self._suspects:
            try:
                self._try_next()
            except CommError as error:
                self._form_anew(error)
        self._is_stepping = self._engine.has_unfinished
        if self._is_stepping:
            try:
                self._engine.start_step(for_s)
            except CommError as error:
                self._is_stepping = False
                self._form_anew(error)

    def finish_step(self) -> list[StepOutput]:
        """Wait for the step that was begun; return what it gave, which from now on is kept."""
        outputs, self._unsaid = self._unsaid, []
        if self._is_stepping:
            self._is_stepping = False
            try:
                given = self._engine.finish_step()
            except CommError as error:
                self._form_anew(error)
            else:
                self._note(given)
                outputs += given
        return outputs

    def abort(self, request_id: str) -> bool:
        """As `Engine.abort`."""
        book = self._books.get(request_id)
        self._unsaid = [output for output in self._unsaid if output.request_id != request_id]
        if book is not None:
            self._forget(book)
            try:
                self._engine.abort(request_id)
            except CommError as error:
                self._form_anew(error)
        return book is not None

    def stop(self, request_id: str, index: int) -> bool:
        """As `Engine.stop`."""
        book = self._books.get(request_id)
        if book is None or not 0 <= index < len(book.outputs) or not book.outputs[index]:
            return False
        self._end(book, index)
        if not book.is_in:
            return True
        try:
            return self._engine.stop(request_id, index)
        except CommError as error:
            self._form_anew(error)
            return True

    def listen(self) -> None:
        """As `RankedEngine.listen`; a world that is lost is formed anew."""
        try:
            self._engine.listen()
        except CommError as error:
            self._form_anew(error)

    # -- the rest ----------------------------------------------------------------------------------

    def place(self, placement: Placement, bytes_per_step: int | None = None) -> None:
        """As `RankedEngine.place`; a world that is formed anew takes the placement over again."""
        self._in_a_world(lambda: self._engine.place(placement, bytes_per_step))
        self._placement = placement

    def resize_expert_cache(self, slots_per_layer: int) -> None:
        """As `Engine.resize_expert_cache`, also for the worlds to come."""
        self._in_a_world(lambda: self._engine.resize_expert_cache(slots_per_layer))
        self._slots_per_layer = slots_per_layer

    def stats(self) -> EngineStats:
        """As `RankedEngine.stats`: of the present world."""
        return self._in_a_world(lambda: self._engine.stats())

    def abandon(self) -> None:
        """As `RankedEngine.abandon`."""
        self._is_closed = True
        self._engine.abandon()

    def close(self) -> None:
        """As `RankedEngine.close`."""
        self._is_closed = True
        self._books.clear()
        self._engine.close()

    def _in_a_world(self, call: Callable[[], Result]) -> Result:
        """Return what a call gives, of another world where one is lost with it."""
        while True:
            try:
                return call()
            except CommError as error:
                self._form_anew(error)

    # -- books -------------------------------------------------------------------------------------

    def _note(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            book = self._books.get(output.request_id)
            if book is None:
                continue
            tokens = book.outputs[output.index]
            if tokens is not None:
                tokens.extend(output.token_ids)
            if output.finish_reason is not None:
                self._end(book, output.index)
            elif book is self._tried and output.token_ids:
                self._clear(book, output.index)

    def _end(self, book: _Book, index: int) -> None:
        book.outputs[index] = None
        if all(tokens is None for tokens in book.outputs):
            self._forget(book)
        elif book is self._tried:
            self._clear(book, index)

    def _forget(self, book: _Book) -> None:
        del self._books[book.request.request_id]
        if book in self._suspects:
            self._suspects.remove(book)
        if book is self._tried:
            self._tried = None

    def _form_anew(self, error: CommError) -> None:
        """Form another world, and give it what is unfinished. Raises CommError after too many."""
        if self._is_closed:
            raise error
        why = str(error)
        self._is_stepping = False  # the step that was begun has gone with them
        while True:
            self._blame(why)
            self._count_loss(why)
            logger.error("the ranks were lost, and are started again: %s", why)
            self._on_loss(why)
            self.generation += 1
            try:
                self._engine = self._open_world(self.generation)
                self._resubmit()
            except CommError as another:
                why = str(another)
                continue
            except MoeServeError as another:  # the model's folder, or memory, is gone
                self._books.clear()
                self._suspects.clear()
                raise CommError(
                    f"{why}; the ranks could not be started again: {another}"
                ) from another
            break
        logger.warning(
            "the ranks are there again (generation %d), with %d unfinished requests",
            self.generation,
            len(self._books),
        )
        self._on_world()

    def _count_loss(self, why: str) -> None:
        now_s = time.monotonic()
        while self._losses_s and now_s - self._losses_s[0] > LOSSES_IN_S:
            self._losses_s.popleft()
        if len(self._losses_s) >= self._max_losses:
            self._books.clear()
            self._suspects.clear()
            raise CommError(
                f"{why} (worlds of ranks lost in the last {LOSSES_IN_S / 60:.0f} minutes: "
                f"{len(self._losses_s) + 1}; the limit is {self._max_losses})"
            )
        self._losses_s.append(now_s)

    def _resubmit(self) -> None:
        if self._slots_per_layer is not None:
            self._engine.resize_expert_cache(self._slots_per_layer)
        if self._placement is not None:
            self._engine.place(self._placement)
        for book in list(self._books.values()):
            if book.num_losses < _SUSPECTED_AFTER:
                self._let_in(book)
        self._try_next()

    def _let_in(self, book: _Book) -> None:
        book.is_in = True
        try:
            self._engine.add(book.rest())
            self.num_resubmitted += 1
        except CommError:
            raise
        except MoeServeError as error:  # less memory, say, than the world before it had
            self._give_up(book, f"the request could not go on after ranks were lost: {error}")

    # -- requests that may be the cause ------------------------------------------------------------

    def _blame(self, why: str) -> None:
        """Note who was under way in a world that was lost, and end who is the cause."""
        self._tried = None
        for book in list(self._books.values()):
            if not book.is_in:
                continue
            book.is_in = False
            book.num_losses += 1
            if book.num_losses > _SUSPECTED_AFTER:
                self._give_up(
                    book,
                    f"the request was under way when ranks were lost {book.num_losses} times: "
                    f"{why}",
                )
        suspects = [b for b in self._books.values() if b.num_losses == _SUSPECTED_AFTER]
        self._suspects = suspects

    def _try_next(self) -> None:
        """Let the next of the suspects in, unless one is being tried."""
        while self._suspects and self._tried is None:
            book = self._suspects.pop(0)
            book.awaited = {i for i, tokens in enumerate(book.outputs) if tokens is not None}
            self._tried = book
            self._let_in(book)

    def _clear(self, book: _Book, index: int) -> None:
        """Note that an output of the request that is tried got further, or ended."""
        book.awaited.discard(index)
        if not book.awaited:
            book.num_losses = _SUSPECTED_AFTER - 1
            self._tried = None

    def _give_up(self, book: _Book, error: str) -> None:
        request_id = book.request.request_id
        self._unsaid += [
            StepOutput(request_id, index, (), finish_reason="error", error=error)
            for index, tokens in enumerate(book.outputs)
            if tokens is not None
        ]
        self._forget(book)


def _outputs_of(request: Request) -> tuple[Any, ...]:
    return request.output_ids or ((),) * request.sampling.n
