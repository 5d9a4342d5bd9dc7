"""From a request's steps to what its caller sees: text, stop strings, times.

One `RequestState` follows one request. Nothing here runs the engine; whoever does hands each
`StepOutput` over and tells the engine about stop strings.
"""

from __future__ import annotations

from moe_serve.errors import MoeServeError
from moe_serve.text.detokenizer import Detokenizer, make_detokenizer
from moe_serve.text.output_routing import OutputRouting, PromptRouting
from moe_serve.text.stop_strings import StopStrings
from moe_serve.text.tokenizer import Tokenizer
from moe_serve.types import (
    CompletionOutput,
    FinishReason,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
)

# tokens whose text is not made before it is asked for: so many take a fraction of a millisecond
_MOST_UNREAD = 1024


class OutputState:
    """One of a request's n outputs so far."""

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        detokenizer: Detokenizer | None,
        routing: OutputRouting,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        """end_ids: the tokens that end a text, and are no part of it."""
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.is_refused = False
        self.routing = routing
        self._end_ids = end_ids
        self._sampling = sampling
        self._detokenizer = detokenizer
        self._stop = StopStrings(sampling.stop) if sampling.stop else None
        self._text = ""
        self._num_read = self._num_of_text = 0  # tokens read, and that are part of the text
        self._held = ""

    @property
    def text(self) -> str:
        """What may be shown: it never shrinks. Made when it is asked for, of many tokens at once.

        Raises MoeServeError where it cannot be made.
        """
        if self._num_read < self._num_of_text:
            self._read()
        return self._text

    def update(self, step: StepOutput) -> bool:
        """Take in what a step gave; return True if a stop string ended the output here."""
        if step.routed_experts is not None:
            self.routing.keep(step.routed_experts)
        if self._stop is None:
            self.token_ids += step.token_ids
            self.logprobs += step.logprobs
            self._num_of_text = len(self.token_ids) - self._hides_last(step)
            if self._num_of_text - self._num_read > _MOST_UNREAD:
                self._read()
        elif self._find_stop(step):
            self.finish_reason = "stop"
            return True
        if step.finish_reason is None:
            return False
        self.finish_reason, self.error = step.finish_reason, step.error
        self.is_refused = step.is_refused
        if self._read(is_whole=True):
            self.finish_reason = "stop"
            return True
        return False

    def _hides_last(self, step: StepOutput) -> bool:
        """Whether the step's last token ends the text before it, and is no part of it."""
        return (
            step.finish_reason == "stop"
            and step.token_ids[-1:] != ()
            and step.token_ids[-1] in self._end_ids
            and not self._sampling.include_stop_str_in_output
        )

    def _find_stop(self, step: StepOutput) -> bool:
        """Take in tokens up to the one with which a stop string ends; return whether one did."""
        num_of_text = len(step.token_ids) - self._hides_last(step)
        for position, token_id in enumerate(step.token_ids):
            self.token_ids.append(token_id)
            self.logprobs += step.logprobs[position : position + 1]
            if position < num_of_text:
                self._num_of_text += 1
                if self._read():
                    return True
        return False

    def _read(self, is_whole: bool = False) -> bool:
        """Make text of the tokens that were not read yet; return whether a stop string ended it."""
        new = self.token_ids[self._num_read : self._num_of_text]
        self._num_read = self._num_of_text
        if self._detokenizer is None:
            return False
        try:
            piece = self._detokenizer.push(new)
            if is_whole:
                piece += self._detokenizer.finish()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise MoeServeError(f"the text of tokens could not be made: {why}") from error
        has_stopped = self._show(piece)
        if is_whole and not has_stopped:
            self._text, self._held = self._text + self._held, ""
        return has_stopped

    def _show(self, piece: str) -> bool:
        """Add `piece` but for what may be the start of a stop string; cut and say so at a match."""
        if self._stop is None:
            self._text += piece
            return False
        pending = self._held + piece
        is_armed = len(self.token_ids) > self._sampling.min_tokens
        match = self._stop.push(piece, is_armed)
        if match is None:
            num_shown = len(pending) - self._stop.num_held
        else:
            num_shown = len(self._held) + match.end
            if not self._sampling.include_stop_str_in_output:
                num_shown -= match.length
        self._text += pending[:num_shown]
        self._held = pending[num_shown:] if match is None else ""
        return match is not None

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=tuple(self.token_ids),
            logprobs=None if self._sampling.logprobs is None else tuple(self.logprobs),
            finish_reason=self.finish_reason,
            error=self.error,
            routed_experts=self.routing.together() if self.token_ids else None,
            is_refused=self.is_refused,
        )


class RequestState:
    """One request with all its outputs. Times are seconds on the clock of `Request.arrival_s`."""

    def __init__(
        self, request: Request, prompt: str | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        sampling = request.sampling
        skips = sampling.skip_special_tokens
        self.request = request
        self.prompt = prompt
        routing = PromptRouting(len(request.prompt_ids))
        eos_ids = frozenset() if sampling.ignore_eos else request.eos_token_ids
        end_ids = eos_ids.union(sampling.stop_token_ids)
        self.outputs = [
            OutputState(
                index,
                sampling,
                None
                if tokenizer is None
                else make_detokenizer(tokenizer, request.prompt_ids, skips),
                OutputRouting(routing),
                end_ids,
            )
            for index in range(sampling.n)
        ]
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self._num_unfinished = sampling.n
        self.num_cached_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def is_finished(self) -> bool:
        return self._num_unfinished == 0

    def update(self, step: StepOutput, now_s: float) -> bool:
        """Take in one step of one output; return True if the engine must be told to stop it.

        What comes for an output that has ended is dropped.
        """
        output = self.outputs[step.index]
        if output.finish_reason is not None:
            return False
        if step.token_ids and self.first_token_s is None:
            self.first_token_s = now_s
        if step.prompt_logprobs is not None:
            self.prompt_logprobs = step.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, step.num_cached_tokens)
        has_stop_string = output.update(step)
        if output.finish_reason is not None:
            self._num_unfinished -= 1
            self.finished_s = now_s
        return has_stop_string and step.finish_reason is None

    def fail(self, why: str) -> None:
        """End a request that was refused: finish_reason "error" for all its outputs, no times."""
        for output in self.outputs:
            output.finish_reason, output.error, output.is_refused = "error", why, True
        self._num_unfinished = 0

    def abort(self) -> None:
        """End what has not ended yet with finish_reason "abort"."""
        for output in self.outputs:
            if output.finish_reason is None:
                output.finish_reason = "abort"
        self._num_unfinished = 0

    def output(self) -> RequestOutput:
        """Return all there is so far: texts and token ids from the start, not only what is new."""
        arrival_s = self.request.arrival_s
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_ids,
            outputs=tuple(output.output() for output in self.outputs),
            finished=self.is_finished,
            prompt_logprobs=self.prompt_logprobs,
            metrics=RequestMetrics(
                ttft_s=None if self.first_token_s is None else self.first_token_s - arrival_s,
                e2e_s=self.finished_s - arrival_s
                if self.is_finished and self.finished_s is not None
                else None,
                num_cached_tokens=self.num_cached_tokens,
            ),
        )
