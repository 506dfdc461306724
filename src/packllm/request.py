"""One request: prompts on their way through the members."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import replace

from torch import Tensor

from packllm.decode.tokens import Ensemble, Row, drop_small, generate_ids
from packllm.errors import ContextOverflowError, MemberError, VocabularyError
from packllm.member import Member, Session
from packllm.options import Options
from packllm.prompt import Encoded, Prompt
from packllm.results import Chunk, FinishReason, Usage
from packllm.sampling import make_sampler
from packllm.scoring import weights_of
from packllm.text import TextStream
from packllm.weights import Weights, find

log = logging.getLogger("packllm")

DEFAULT_MAX_TOKENS = 256


class Request:
    """Prompts, encoded for the members that may run, then prefilled, weighed and decoded together.

    Args:
        members: the pack's members.
        options: the request's options.
        prompts: checked prompts (see prompt.check), at least one.

    Attributes:
        encoded: each prompt as each candidate reads it: {member index: Encoded} per prompt.
        sessions: open sessions by member index, one row a prompt; filled in by prefill().
        weights: final weights of each prompt, over all members of the pack; filled in by prefill().
        timings: seconds spent so far: prefill, weighting.
    """

    def __init__(self, members: Sequence[Member], options: Options, prompts: Sequence[Prompt]) -> None:
        self.members, self.options = members, options
        self._candidates = list(range(len(members)))
        if isinstance(options.weighting, dict):  # members that are given no weight need not even score
            given = {name: value for name, value in options.weighting.items() if value != 0}
            self._candidates = [k for k, member in enumerate(members) if member.name in given]
            self.options = options.model_copy(update={"weighting": given})
        self.encoded: list[dict[int, Encoded]] = [
            {k: members[k].encoder.encode(prompt, options.score_on) for k in self._candidates} for prompt in prompts
        ]
        self.sessions: dict[int, Session] = {}
        self.weights: list[Weights] = []
        self.timings: dict[str, float] = {}

    def require_one_vocabulary(self) -> None:
        """VocabularyError unless the members that may run decode in one vocabulary."""
        first = self.members[self._candidates[0]]
        for k in self._candidates[1:]:
            member = self.members[k]
            if not member.vocabulary.same_as(first.vocabulary) and self.options.weighting != "top1":
                raise VocabularyError(
                    f"members {first.name!r} and {member.name!r} have different vocabularies; weighing them works, "
                    f"decoding them together is not built yet: use weighting='top1', fixed weights on members of "
                    f"one vocabulary, or a pack of such members"
                )

    def limits(self, wanted: int | None) -> list[int]:
        """Tokens that each prompt may be followed by: `wanted`, or what fits up to the default.

        Raises:
            ContextOverflowError: a prompt and the tokens wanted do not fit a member that may run.
        """
        return [self._limit(encoded, wanted) for encoded in self.encoded]

    def _limit(self, encoded: dict[int, Encoded], wanted: int | None) -> int:
        limit = DEFAULT_MAX_TOKENS if wanted is None else wanted
        for k, prompt in encoded.items():
            member = self.members[k]
            if member.context_window is None:
                continue
            room = member.context_window - len(prompt.ids)
            if room < (1 if wanted is None else wanted):
                raise ContextOverflowError(member.name, member.context_window, len(prompt.ids), wanted or 1)
            limit = min(limit, room)
        return limit

    def prefill(self) -> None:
        """Run every candidate over the prompts once: caches, scores, weights.

        Raises:
            MemberError: a member fails, and on_member_error is "raise" or it is the last one.
        """
        started = time.perf_counter()
        keep = isinstance(self.options.weighting, str) and find(self.options.weighting).needs_logits
        logprobs: dict[int, list[Tensor]] = {}
        for k in self._candidates:
            session = self.members[k].open([encoded[k].ids for encoded in self.encoded])
            try:
                logprobs[k] = session.prefill([encoded[k].positions for encoded in self.encoded], keep)
            except MemberError as error:
                session.close()
                last = k == self._candidates[-1] and not self.sessions
                if self.options.on_member_error == "raise" or last:
                    raise
                log.warning("going on without a member: %s", error)
                continue
            self.sessions[k] = session
        self.timings["prefill"] = time.perf_counter() - started
        started = time.perf_counter()
        live = list(self.sessions)
        for row, encoded in enumerate(self.encoded):
            weights = weights_of(
                [self.sessions[k] for k in live],
                row,
                [encoded[k] for k in live],
                [logprobs[k][row] for k in live],
                self._options_for(live),
            )
            self.weights.append(drop_small(self._over_all(weights, live), self.options.min_weight))
        for session in self.sessions.values():
            session.release()
        self.timings["weighting"] = time.perf_counter() - started

    def _options_for(self, live: Sequence[int]) -> Options:
        """The options, with fixed weights renormalised over the members that are left."""
        if not isinstance(self.options.weighting, dict) or len(live) == len(self._candidates):
            return self.options
        left = {self.members[k].name: self.options.weighting[self.members[k].name] for k in live}
        total = sum(left.values())
        return self.options.model_copy(update={"weighting": {name: value / total for name, value in left.items()}})

    def _over_all(self, weights: Weights, live: Sequence[int]) -> Weights:
        """Weights of the live members as weights of all: 0 and not scored for the others."""
        values = [0.0] * len(self.members)
        nll: list[float | None] = [None] * len(self.members)
        for k, value, score in zip(live, weights.values, weights.nll, strict=True):
            values[k], nll[k] = value, score
        names = tuple(member.name for member in self.members)
        return replace(weights, names=names, values=tuple(values), nll=tuple(nll))

    def chunks(self) -> Generator[tuple[int, Chunk], None, None]:
        """Prefill, then decode: pieces of text as (index of the prompt, Chunk), until all are finished.

        Closing the iterator frees the caches; at most the step under way is finished.
        """
        started = time.perf_counter()
        options = self.options
        limits = self.limits(options.max_tokens)
        try:
            self.prefill()
            rows = [
                Row(weights, make_sampler(options.temperature, options.top_p, options.top_k, options.seed))
                for weights in self.weights
            ]
            ensemble = Ensemble(self.sessions, rows, drop=options.on_member_error == "drop")
            answers = [self._answer(r, row, ensemble.running(r), limits[r]) for r, row in enumerate(rows)]
            for r, token in generate_ids(ensemble, rows):
                self.timings.setdefault("first_token", time.perf_counter() - started)
                text, reason = answers[r].push(token)
                rows[r].done = reason is not None
                if reason is not None:
                    timings = {**self.timings, "total": time.perf_counter() - started}
                    usage = Usage(answers[r].prompt_tokens, answers[r].count)
                    yield r, Chunk(text, rows[r].weights, reason, usage, timings)
                elif text:
                    yield r, Chunk(text, rows[r].weights)
        finally:
            self.close()

    def _answer(self, index: int, row: Row, running: Sequence[int], limit: int) -> Answer:
        top = max(running, key=lambda k: row.weights.values[k])
        ends = frozenset().union(*(self.members[k].end_ids for k in running))
        text = TextStream(self.members[top].vocabulary, self.options.stop)
        return Answer(text, ends, limit, len(self.encoded[index][top].ids))

    def close(self) -> None:
        """Free the caches."""
        for session in self.sessions.values():
            session.close()


class Answer:
    """A row's tokens becoming text, until an end token, a stop string or the limit.

    Args:
        text: turns tokens into text.
        ends: ids that end an answer.
        limit: most tokens.
        prompt_tokens: length of the prompt, for the usage.

    Attributes:
        count: tokens so far, without the one that ended the answer.
    """

    def __init__(self, text: TextStream, ends: frozenset[int], limit: int, prompt_tokens: int) -> None:
        self._text, self._ends, self._limit = text, ends, limit
        self.prompt_tokens, self.count = prompt_tokens, 0

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that one more token makes sure, and why the answer ends with it, if it does."""
        if token in self._ends:
            return self._text.finish(), "stop"
        self.count += 1
        text = self._text.push(token)
        if self._text.stopped:
            return text, "stop"
        if self.count < self._limit:
            return text, None
        text += self._text.finish()
        return text, "stop" if self._text.stopped else "length"
