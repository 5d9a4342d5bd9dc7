"""Which sequences run in a step, with how many tokens, and what their new tokens mean.

Owns the queues and the rules by which an output ends. Knows nothing of tensors: blocks are
`kv_cache.py`'s, and the order of requests is a policy's (`policies/`).

A sequence waits, then runs: first as a prompt, in chunks, then as a decode of one token a step.
When blocks run out, the last running sequence in the policy's order is preempted: it waits again
with its tokens kept, and is computed anew as a prompt. A sequence that is itself the last keeps its
blocks and sits the step out. The first in the order always runs, so every request ends.
A request whose grammar is being compiled is held: it has its place in the order, and no more yet.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING

from moe_serve.engine.admission import checked_end_length
from moe_serve.engine.counts import Counts
from moe_serve.engine.kv_cache import KVCacheManager
from moe_serve.engine.policies.base import Policy
from moe_serve.engine.routed_outputs import routed_of, with_routed
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep, Sequence
from moe_serve.errors import RequestError
from moe_serve.types import FinishReason, Request, StepOutput, TokenLogprobs

if TYPE_CHECKING:
    from moe_serve.engine.grammar import Matcher

Rank = tuple[float, int, int]
"""The policy's rank, the order of arrival, the index among a request's outputs: unique."""


class _Live:
    """A request in the scheduler: its place in the order, when its outputs end, those not ended.

    check_length: from which length on every token may be the last. matchers: of outputs that there
    are not yet, by index.
    """

    __slots__ = (
        "check_length", "end_length", "is_held", "matchers", "min_length", "order", "rank",
        "sequences", "stop_ids",
    )  # fmt: skip

    def __init__(self, request: Request, rank: float, order: int, end_length: int) -> None:
        sampling = request.sampling
        eos = frozenset() if sampling.ignore_eos else request.eos_token_ids
        self.stop_ids = eos.union(sampling.stop_token_ids)
        self.min_length = len(request.prompt_ids) + sampling.min_tokens
        self.end_length = end_length
        self.check_length = end_length if sampling.structured_outputs is None else 0
        self.rank = rank
        self.order = order
        self.is_held = False
        self.matchers: dict[int, Matcher] = {}
        self.sequences: dict[int, Sequence] = {}

    def finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Return why a sequence ends after the token that it has just got, or None."""
        tokens = sequence.token_ids
        length = len(tokens)
        if tokens[-1] in self.stop_ids and length >= self.min_length:
            return "stop"
        if sequence.matcher is not None and sequence.matcher.is_complete(tokens):
            return "stop"
        return "length" if length >= self.end_length else None


class Scheduler:
    """Fills steps, and reads their results: call `schedule` and `finish` in turns.

    max_num_seqs: sequences that run at once, as many as `kv` has rows. max_num_batched_tokens: the
        most tokens of one step. max_prefill_chunk: the most prompt tokens of one sequence in one
        step; None: as many as the step has. max_model_len: the most tokens of prompt and output
        together. clock: seconds, for the policy. admission_horizon: a prompt is admitted only when
        every running sequence can still grow by so many tokens: less recomputing later.
    counts: since the start, and so num_preemptions, prefix_query_tokens and prefix_hit_tokens: the
    tokens that admitted sequences (preempted ones too) looked for, and found, in the cache.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_chunk: int | None,
        policy: Policy,
        kv: KVCacheManager,
        max_model_len: int,
        clock: Callable[[], float],
        admission_horizon: int = 16,
    ) -> None:
        assert max_num_seqs == kv.max_num_seqs, "one row of the tables for each sequence"
        self._budget = max_num_batched_tokens
        self._max_chunk = min(max_prefill_chunk or self._budget, self._budget)
        self.policy = policy
        self._kv = kv
        self._max_model_len = max_model_len
        self._clock = clock
        self._admission_horizon = admission_horizon
        self._requests: dict[str, _Live] = {}
        self._waiting: list[tuple[Rank, Sequence]] = []  # sorted
        self._prompts: list[Sequence] = []
        self._decodes: list[Sequence] = []
        self._num_added = 0
        self._num_ended = 0
        self._num_held = 0
        self._step = 0
        self._num_step_decodes = 0
        self._refused: tuple[Sequence, int] | None = None  # and num_changes when it did not fit
        self.counts = Counts()
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    @property
    def kv(self) -> KVCacheManager:
        return self._kv

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def has(self, request_id: str) -> bool:
        """Whether a request has outputs that go on."""
        return request_id in self._requests

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + self._num_held

    @property
    def num_running(self) -> int:
        return len(self._prompts) + len(self._decodes)

    def add(self, request: Request, is_held: bool = False) -> None:
        """Queue a request; refuse at once, changing nothing, one that can never be served.

        is_held: until `release` or `refuse` is called.
        Raises RequestError for an empty or too long prompt or an id in use, and CapacityError when
        the blocks of the whole cache could not hold one of its outputs.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request_id {request.request_id!r} is in use by an unfinished request; "
                "give another, or abort that one"
            )
        end_length = checked_end_length(request, self._kv, self._max_model_len, self._max_chunk)
        rank = self.policy.rank(request, self._clock())
        live = _Live(request, rank, self._num_added, end_length)
        for index in _first_outputs(request):
            sequence = live.sequences[index] = Sequence(request, index)
            if index == 0 and request.sampling.prompt_logprobs is not None:
                sequence.prompt_logprobs.append(None)
        self._num_added += 1
        self._requests[request.request_id] = live
        live.is_held = is_held
        self._num_held += is_held
        if not is_held:
            for sequence in live.sequences.values():
                self._wait(sequence)

    def release(self, request_id: str, matchers: list[Matcher]) -> None:
        """Queue a request that was held; matchers: one for each of its outputs."""
        live = self._requests[request_id]
        self._let_go(live)
        live.matchers = dict(enumerate(matchers))
        for sequence in live.sequences.values():
            sequence.matcher = live.matchers.pop(sequence.index)
            self._wait(sequence)

    def refuse(self, request_id: str, error: str, is_refused: bool) -> list[StepOutput]:
        """End every output of a request that was held. is_refused: as in `StepOutput`."""
        live = self._requests[request_id]
        self._let_go(live)
        outputs: list[StepOutput] = []
        for sequence in tuple(live.sequences.values()):
            self._fail(sequence, error, outputs, is_refused)
        return outputs

    def abort(self, request_id: str) -> bool:
        """End all outputs of a request now, without a StepOutput; False: there is no such one.

        Allowed at any time, also while a step runs: `finish` then skips its rows.
        """
        live = self._requests.get(request_id)
        if live is None:
            return False
        first = live.sequences.get(0)
        if first is not None and not first.num_output_tokens and not first.request.is_resumed:
            num_unborn = first.request.sampling.n - len(live.sequences)  # that it would have had
            self.counts.num_finished["abort"] += num_unborn
        for sequence in tuple(live.sequences.values()):
            self._end(sequence, "abort")
        self._drop_ended()
        return True

    def stop(self, request_id: str, index: int) -> bool:
        """End one output that has tokens, because its text is complete, without a StepOutput."""
        live = self._requests.get(request_id)
        sequence = live.sequences.get(index) if live is not None else None
        if sequence is None or sequence.num_output_tokens == 0:
            return False
        self._end(sequence, "stop")
        self._drop_ended()
        return True

    def schedule(self) -> ScheduledStep | None:
        """Fill the next step; None when no request is left that is not held.

        Decodes first, each one token; with more of them than the budget, in turns. Then prompt
        chunks in the policy's order, of running and of newly admitted sequences alike.
        """
        num_preemptions = self.num_preemptions
        decodes = self._schedule_decodes()
        chunks = self._schedule_prompts(len(decodes), self.num_preemptions > num_preemptions)
        if self.num_preemptions > num_preemptions:
            decodes = [sequence for sequence in decodes if sequence.row >= 0]
            self._drop_ended()
        if not decodes and not chunks:
            assert len(self._requests) == self._num_held, (
                "requests are left, and none of them can run"
            )
            return None
        return self._make_step(decodes, chunks)

    def _schedule_decodes(self) -> list[Sequence]:
        """Return the decodes of this step, with room made for a token of each."""
        kv, decodes, budget = self._kv, self._decodes, self._budget
        if len(decodes) <= budget and not kv.rows_to_copy:
            size = kv.block_size
            due = [sequence for sequence in decodes if not sequence.num_computed_tokens % size]
            if all(kv.extend(sequence, 1) for sequence in due):
                return decodes.copy()
        chosen: list[Sequence] = []
        passed: list[Sequence] = []
        for sequence in decodes:
            if sequence.row < 0:
                continue  # preempted for one before it
            num_preemptions = self.num_preemptions
            if len(chosen) < budget and self._make_room(sequence, 1):
                chosen.append(sequence)
            else:
                passed.append(sequence)
            if self.num_preemptions > num_preemptions:  # their share of the budget is free again
                chosen = [other for other in chosen if other.row >= 0]
        if passed:
            self._decodes = passed + chosen  # who was passed over is first next time
        return chosen

    def _schedule_prompts(
        self, num_decodes: int, is_short_of_blocks: bool
    ) -> list[tuple[Sequence, int]]:
        """Return the prompts of this step and the size of each one's chunk, with room made."""
        left = self.policy.prompt_tokens(self._budget, num_decodes)
        running = [sequence for sequence in self._prompts if sequence.row >= 0]
        unfinished = running.copy()  # who may still lack blocks after this step
        running.sort(key=self._rank, reverse=True)  # first in the order at the end
        may_admit = not is_short_of_blocks
        chunks: list[tuple[Sequence, int]] = []
        while left > 0:
            head = self._waiting[0] if may_admit and self._waiting else None
            is_new = head is not None and (not running or head[0] < self._rank(running[-1]))
            if head is not None and is_new:
                sequence = head[1]
                if not self._admit(sequence, unfinished):
                    may_admit = False
                    continue
            elif running:
                sequence = running.pop()
                if sequence.row < 0:
                    continue  # preempted for one before it
            else:
                break
            missing = len(sequence.token_ids) - sequence.num_computed_tokens
            size = min(missing, left, self._max_chunk)
            num_preemptions = self.num_preemptions
            if self._make_room(sequence, size):
                chunks.append((sequence, size))
                left -= size
                if is_new and size < missing:
                    unfinished.append(sequence)
            else:
                may_admit = False
            may_admit = may_admit and num_preemptions == self.num_preemptions
        return chunks

    def _admit(self, sequence: Sequence, unfinished: list[Sequence]) -> bool:
        """Move the head of the queue to the running prompts, if rows and blocks allow it.

        unfinished: running prompts that may still lack blocks, which are not taken from them.
        """
        kv = self._kv
        if not kv.num_free_rows or self._refused == (sequence, kv.num_changes):
            return False
        prefix = kv.find_prefix(sequence)
        spare = -(-self.num_running * self._admission_horizon // kv.block_size)
        if not kv.can_admit(sequence, prefix, unfinished, spare, self._max_chunk):
            self._refused = (sequence, kv.num_changes)
            return False
        del self._waiting[0]
        self.prefix_query_tokens += kv.num_searched(sequence)
        kv.admit(sequence, prefix)
        sequence.state = "running"
        self._prompts.append(sequence)
        self.prefix_hit_tokens += sequence.num_computed_tokens
        if len(sequence.token_ids) == sequence.num_prompt_tokens:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Find blocks for a running sequence's next tokens, from those after it in the order.

        False when there are not enough and nobody is after it: it sits this step out.
        """
        while not self._kv.extend(sequence, num_tokens):
            running = chain(self._decodes, self._prompts)
            victim = max((other for other in running if other.row >= 0), key=self._rank)
            if victim is sequence:
                return False
            self._kv.release(victim)
            victim.num_computed_tokens = 0
            victim.num_preemptions += 1
            self.num_preemptions += 1
            self._wait(victim)
        return True

    def _make_step(
        self, decodes: list[Sequence], chunks: list[tuple[Sequence, int]]
    ) -> ScheduledStep:
        num_decodes = self._num_step_decodes = len(decodes)
        self._step += 1
        sources, sampled = list(range(num_decodes)), decodes.copy()
        sequences, query_lens = decodes, [1] * num_decodes
        for sequence, size in chunks:
            if sequence.num_computed_tokens + size == len(sequence.token_ids):
                outputs = self._outputs_of(sequence)
                sources += [len(sequences)] * len(outputs)
                sampled += outputs
            sequences.append(sequence)
            query_lens.append(size)
        return ScheduledStep(
            self._step, sequences, query_lens, sources, sampled, self._kv.take_copies()
        )

    def _outputs_of(self, sequence: Sequence) -> list[Sequence]:
        """Return who receives a token after a sequence's last one: a fresh prompt forks into n."""
        request = sequence.request
        is_first = len(sequence.token_ids) == sequence.num_prompt_tokens
        if sequence.index or not is_first or request.is_resumed:
            return [sequence]
        forks = [Sequence(request, index) for index in range(1, request.sampling.n)]
        live = self._requests[request.request_id]
        for fork in forks:
            fork.num_cached_tokens = sequence.num_cached_tokens
            fork.matcher = live.matchers.pop(fork.index, None)
            live.sequences[fork.index] = fork
        return [sequence, *forks]

    def finish(self, step: ScheduledStep, output: SamplerOutput) -> list[StepOutput]:
        """Append a step's tokens, end what is complete, and report what is new, in its order.

        Rows that failed end with finish_reason "error" and are reported first.
        """
        assert step.step == self._step, f"step {step.step} finished, {self._step} runs"
        self.counts.add(step, self._num_step_decodes)
        routed = routed_of(step, output) if output.routed_experts else {}
        num_ended = self._num_ended
        outputs: list[StepOutput] = []
        for index, error in output.sequence_errors.items():
            self._fail(step.sequences[index], error, outputs)
        failed = {step.sample_sources[index] for index in output.errors} if output.errors else set()
        self._finish_chunks(step, output, failed)
        for index, error in output.errors.items():
            self._fail_output(step.sampled[index], error, outputs, index in output.refused)
        num_failed = len(outputs)
        self._finish_decodes(step, output, outputs)
        self._finish_prompts(step, output, outputs)
        self.counts.num_generation_tokens += len(outputs) - num_failed
        if routed:
            outputs = with_routed(outputs, routed)
        if self._num_ended > num_ended:
            self._drop_ended()
        return outputs

    def fail(self, step: ScheduledStep, error: str) -> list[StepOutput]:
        """End every output of a step that could not be run; to be called in place of `finish`."""
        assert step.step == self._step, f"step {step.step} failed, {self._step} runs"
        outputs: list[StepOutput] = []
        for sequence in step.sequences:
            self._fail(sequence, error, outputs)
        self._drop_ended()
        return outputs

    def retract(self, step: ScheduledStep) -> None:
        """Put the sequences of a step that was interrupted back in the queue, nothing lost.

        To be called in place of `finish`. They are computed anew, as if preempted.
        """
        assert step.step == self._step, f"step {step.step} retracted, {self._step} runs"
        for sequence in step.sampled:
            if sequence.row < 0 and sequence.state != "finished":  # a fork: it is made again
                live = self._requests[sequence.request.request_id]
                del live.sequences[sequence.index]
                if sequence.matcher is not None:
                    live.matchers[sequence.index] = sequence.matcher
        for sequence in step.sequences:
            if sequence.row >= 0:
                self._kv.release(sequence)
                sequence.num_computed_tokens = 0
                self._wait(sequence)
        self._drop_ended()

    def _finish_chunks(self, step: ScheduledStep, output: SamplerOutput, failed: set[int]) -> None:
        """Note that the prompts' chunks are computed, and fork the prompts that are complete."""
        completed = False
        for index in range(self._num_step_decodes, len(step.sequences)):
            sequence = step.sequences[index]
            if sequence.row < 0:
                continue
            if index in output.prompt_logprobs:
                _keep_prompt_logprobs(sequence, output.prompt_logprobs[index])
            sequence.num_computed_tokens += step.query_lens[index]
            if index not in failed:
                self._kv.register(sequence)
            if sequence.num_computed_tokens == len(sequence.token_ids):
                completed = True
                self._decodes.append(sequence)
        if not completed:
            return
        self._prompts = [
            sequence
            for sequence in self._prompts
            if sequence.num_computed_tokens < len(sequence.token_ids)
        ]
        for index in range(self._num_step_decodes, len(step.sampled)):
            fork, parent = step.sampled[index], step.sequences[step.sample_sources[index]]
            if fork is not parent and parent.row >= 0 and self._kv.fork(parent, fork):
                fork.state = "running"
                self._decodes.append(fork)

    def _fail(
        self, sequence: Sequence, error: str, outputs: list[StepOutput], is_refused: bool = False
    ) -> None:
        """End a sequence, and with a prompt that has no output yet all that it would have had."""
        request = sequence.request
        is_alone = sequence.num_output_tokens or sequence.index or request.is_resumed
        if sequence.state == "finished" or is_alone:
            self._fail_output(sequence, error, outputs, is_refused)
            return
        live = self._requests[request.request_id]
        for index in range(request.sampling.n):
            fork = live.sequences.get(index)
            if fork is not None:
                self._fail_output(fork, error, outputs, is_refused)
            else:
                unborn = StepOutput(
                    request.request_id,
                    index,
                    (),
                    finish_reason="error",
                    error=error,
                    is_refused=is_refused,
                )
                outputs.append(unborn)
                self.counts.num_finished["error"] += 1

    def _fail_output(
        self, sequence: Sequence, error: str, outputs: list[StepOutput], is_refused: bool = False
    ) -> None:
        if sequence.state == "finished":
            return
        is_first = sequence.num_output_tokens == 0
        self._end(sequence, "error")
        outputs.append(
            StepOutput(
                sequence.request.request_id,
                sequence.index,
                (),
                (),
                "error",
                _prompt_logprobs(sequence) if is_first else None,
                error,
                sequence.num_cached_tokens if is_first else 0,
                is_refused=is_refused,
            )
        )

    def _finish_decodes(
        self, step: ScheduledStep, output: SamplerOutput, outputs: list[StepOutput]
    ) -> None:
        """Give the step's decodes their tokens: the one loop that runs for every token."""
        kv, size, requests, report = self._kv, self._kv.block_size, self._requests, outputs.append
        logprobs: tuple[TokenLogprobs, ...] = ()
        for index in range(self._num_step_decodes):
            sequence = step.sampled[index]
            if sequence.row < 0:
                continue  # ended while the step ran
            token = output.token_ids[index]
            tokens = sequence.token_ids
            sequence.num_computed_tokens = length = len(tokens)
            tokens.append(token)
            if not length % size:
                kv.register(sequence)
            request_id = sequence.request.request_id
            live = requests[request_id]
            if output.logprobs is not None:
                logprobs = _entry(output.logprobs[index])
            if token in live.stop_ids or length + 1 >= live.check_length:
                reason = live.finish_reason(sequence)
                if reason is not None:
                    self._end(sequence, reason)
                report(StepOutput(request_id, sequence.index, (token,), logprobs, reason))
            else:
                report(StepOutput(request_id, sequence.index, (token,), logprobs))

    def _finish_prompts(
        self, step: ScheduledStep, output: SamplerOutput, outputs: list[StepOutput]
    ) -> None:
        """Give the prompts that are complete, and their forks, a token each."""
        for index in range(self._num_step_decodes, len(step.sampled)):
            sequence = step.sampled[index]
            if sequence.state == "finished":
                continue  # ended while the step ran
            token, request_id = output.token_ids[index], sequence.request.request_id
            sequence.token_ids.append(token)
            is_first = sequence.num_output_tokens == 1
            reason = self._requests[request_id].finish_reason(sequence)
            if reason is not None:
                self._end(sequence, reason)
            elif sequence.row < 0:
                self._wait(sequence)  # a fork for which there is no row: it is computed anew
            outputs.append(
                StepOutput(
                    request_id,
                    sequence.index,
                    (token,),
                    _entry(output.logprobs[index]) if output.logprobs is not None else (),
                    reason,
                    _prompt_logprobs(sequence) if is_first else None,
                    None,
                    sequence.num_cached_tokens if is_first else 0,
                )
            )

    def _rank(self, sequence: Sequence) -> Rank:
        live = self._requests[sequence.request.request_id]
        return live.rank, live.order, sequence.index

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = "waiting"
        insort(self._waiting, (self._rank(sequence), sequence))

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take a sequence's blocks and its place in the queue; `_drop_ended` must follow."""
        if sequence.row >= 0:
            self._kv.release(sequence)
        elif sequence.state == "waiting":
            place = (self._rank(sequence), sequence)
            index = bisect_left(self._waiting, place[0], key=lambda entry: entry[0])
            if index < len(self._waiting) and self._waiting[index][1] is sequence:
                del self._waiting[index]
        sequence.state = "finished"
        sequence.finish_reason = reason
        self._num_ended += 1
        self.counts.num_finished[reason] += 1
        request_id = sequence.request.request_id
        live = self._requests[request_id]
        del live.sequences[sequence.index]
        if not live.sequences:
            self._let_go(live)
            del self._requests[request_id]

    def _let_go(self, live: _Live) -> None:
        self._num_held -= live.is_held
        live.is_held = False

    def _drop_ended(self) -> None:
        """Take those who have no row any more out of the running lists."""
        self._decodes = [sequence for sequence in self._decodes if sequence.row >= 0]
        self._prompts = [sequence for sequence in self._prompts if sequence.row >= 0]


def _first_outputs(request: Request) -> list[int]:
    """Return the outputs that a request begins with: one whose prompt is computed for all of them.

    Of one that is resumed: those that have not ended, which are computed as if preempted.
    """
    if not request.is_resumed:
        return [0]
    return [index for index, tokens in enumerate(request.output_ids) if tokens is not None]


def _keep_prompt_logprobs(sequence: Sequence, entries: list[TokenLogprobs]) -> None:
    """Keep the logprobs of the tokens after each of a chunk's, without those kept already."""
    known, after = sequence.prompt_logprobs, sequence.num_computed_tokens + 1
    known += entries[len(known) - after : max(0, sequence.num_prompt_tokens - after)]


def _prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
    if sequence.index or sequence.request.sampling.prompt_logprobs is None:
        return None
    return tuple(sequence.prompt_logprobs)


def _entry(logprobs: TokenLogprobs | None) -> tuple[TokenLogprobs, ...]:
    return () if logprobs is None else (logprobs,)
