"""Answers with a guaranteed form: a grammar masks the fused distribution before a token is chosen.

At every token the shortest completion is known (see closing.py). A token is only accepted if a completion after it fits
the rest of max_tokens. So every answer is complete, the model chooses freely while there is room, and an answer that
had to be shortened ends with finish reason "length". If not even the shortest answer fits, an error is raised before
the first token.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary
from packllm.decode.closing import Place, Way, shortest, spelled_bytes, tails_of
from packllm.decode.grammar import Grammar
from packllm.decode.matcher import Matcher, byte_tree, vocabulary_tree
from packllm.decode.sampling import Sampler
from packllm.errors import OptionError

_LEAST_LOGPROB = -1e30  # so that a token of probability 0 can be chosen if the grammar demands it
_TRIES = 64  # rejected tokens before the shortest completion is used


class Constraint:
    """The grammar of one answer while it is generated.

    Args:
        grammar: from make_grammar.
        vocabulary: of the running members.
        ends: ids that end an answer; allowed where the grammar allows an end.
        limit: maximum number of tokens.

    Attributes:
        complete: whether the answer is complete; then nothing can follow.
        cut: whether the limit excluded a token that the model had chosen.

    Raises:
        OptionError: no answer of this form fits the limit.
    """

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, ends: Collection[int], limit: int) -> None:
        tree, self._ids = vocabulary_tree(vocabulary)
        self._tokens, self._ends, self._room = vocabulary.tokens, sorted(ends), limit
        self._matcher, self._bytes = Matcher(tree, grammar.lark), Matcher(byte_tree(), grammar.lark)
        self._spelled, self._hints, self._place = spelled_bytes(self._ids), grammar.hints, Place()
        self.complete, self.cut = False, False
        way = _first_way(grammar, self._spelled.tobytes())
        if way is None:
            raise OptionError(
                "cannot find an answer of the form that json_schema or tool_choice demands: all are too long, endless, "
                "or need bytes that the vocabulary lacks; use a simpler schema"
            )
        self._way = Way(way, self._ids)
        if self._way.tokens > limit:
            raise OptionError(
                f"max_tokens={limit} is too few for any answer of the form that json_schema or tool_choice demands: "
                f"the shortest takes {self._way.tokens} tokens; raise max_tokens, or let the prompt leave more room"
            )

    def wrap(self, sample: Sampler) -> Sampler:
        """A sampler that calls `sample` for tokens that the grammar allows and that leave room for a completion."""

        def constrained(logprobs: Tensor) -> int:
            logprobs = logprobs.clamp(min=_LEAST_LOGPROB).masked_fill(~self._allowed(logprobs), -torch.inf)
            too_long: set[tuple] = set()  # positions whose completions do not fit
            for _ in range(_TRIES):
                token = sample(logprobs)
                if token in self._ends or self._take(token, too_long):
                    return token
                self.cut = True
                logprobs[token] = -torch.inf
                if not logprobs.isfinite().any():
                    break
            token = self._way.first()
            self._take(token, set())
            return token

        return constrained

    def _allowed(self, logprobs: Tensor) -> Tensor:
        mask = self._matcher.mask()
        allowed = torch.zeros(len(logprobs), dtype=torch.bool)
        size = min(len(mask) - 1, len(logprobs))
        allowed[:size] = torch.from_numpy(mask[:size])
        if mask[-1]:
            allowed[[token for token in self._ends if token < len(logprobs)]] = True
        if not allowed.any():
            raise OptionError("the grammar of the answer fails: no token may come next; use a simpler schema")
        return allowed.to(logprobs.device)

    def _take(self, token: int, too_long: set[tuple]) -> bool:
        """Accept a token that the grammar allows, if a completion after it fits the remaining tokens.

        A position without a fitting completion is remembered, so that tokens that lead there are not tried again.
        """
        text = self._tokens[token]
        before = self._place
        self._bytes.consume(text)
        self._place = before.after(text)
        looks = (self._bytes.mask().tobytes(), self._place.looks) if too_long else ()
        way = None if looks in too_long else self._way_after(text, before)
        if way is None:
            too_long.add((self._bytes.mask().tobytes(), self._place.looks))
            self._bytes.back(len(text))
            self._place = before
            return False
        self._matcher.consume([token])
        self._way, self._room = way, self._room - 1
        self.complete = self._matcher.stopped
        return True

    def _way_after(self, text: bytes, before: Place) -> Way | None:
        """A completion after `text`, the bytes that came next; None if none is found that fits.

        Usually it is a part of the last completion, which is quick to check. Otherwise a search starts with closing
        what `text` opened.
        """
        room = self._room - 1
        last = self._way.text
        if last.startswith(text):
            way = self._way.after(len(text))
            if way.tokens <= room:
                return way
        tails = tails_of(last, before)
        tail = None if self._place.quoted else tails.get(len(self._place.stack))
        parts = [last] if self._place.quoted and last[:1] == b'"' else [tail, last[len(text) :], last]
        for part in parts:
            if part is not None and self._bytes.ends_by(part):
                way = self._way.after(len(last) - len(part))
                if way.tokens <= room:
                    return way
        completion = shortest(self._bytes, self._place, self._spelled, self._hints, tails)
        if completion is None:
            return None
        way = Way(completion, self._ids)
        return way if way.tokens <= room else None


@lru_cache(64)
def _first_way(grammar: Grammar, spelled: bytes) -> bytes | None:
    return shortest(Matcher(byte_tree(), grammar.lark), Place(), np.frombuffer(spelled, bool), grammar.hints)
