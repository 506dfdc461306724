"""The likeliest next tokens that a server names, by the ids of a vocabulary that is known here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packllm.chat.prompt import Encoder
from packllm.engines.server.answers import Wrong, first_choice
from packllm.engines.server.http import ATTEMPTS, Endpoint, Gate, ServerError, unguarded
from packllm.results import Bill

COUNTS = (20, 5)
"""How many tokens are asked for at first: vLLM gives at most 20, others 5."""

WIDE = 1000
"""How many are asked for where a server has no bound (llama-server); they cost no more than the step."""

NAMED = 128
"""Most ids that vLLM takes as `logprob_token_ids`."""

_TRIED = "The capital of France is"
_CLOSE = 0.2


@dataclass(frozen=True)
class Top:
    """Log-probabilities of some next tokens, by id, and what no other one can be above."""

    known: Mapping[int, float]
    rest: float


class Tops:
    """Asks a server for them.

    Args:
        count: how many it gives.
        wide: whether it gives any number of them.
        named: whether it gives those of ids that are asked for.
    """

    def __init__(
        self, endpoint: Endpoint, model: str, encoder: Encoder, count: int = 1, wide: bool = False, named: bool = False
    ) -> None:
        self._endpoint, self._model, self._encoder = endpoint, model, encoder
        self.count, self.wide, self.named = count, wide, named
        self._by_text: dict[str, int] = {}
        for i in encoder.vocabulary.text:
            self._by_text.setdefault(encoder.vocabulary.tokens[i].decode(errors="replace"), i)

    @classmethod
    def of(cls, endpoint: Endpoint, model: str, encoder: Encoder) -> tuple[Tops | None, str]:
        """What a server gives, where its tokens are those of the encoder; what was found, in words."""
        ids = encoder.encode(_TRIED).ids
        tops, reason = cls(endpoint, model, encoder), ""
        for count in COUNTS:
            tops.count = count
            try:
                tops._check(ids)
                break
            except ServerError as error:
                reason = reason or str(error)
        else:
            return None, f"it does not name its likeliest next tokens by ids of the tokenizer: {reason}"
        try:
            tops.wide = len(tops._ask(ids, WIDE, (), Bill(), attempts=2)) >= min(WIDE, len(encoder.vocabulary))
        except ServerError:
            tops.wide = False
        if not tops.wide:
            likely = tops.top(ids, Bill()).known
            unlikely = [i for i in encoder.vocabulary.text if i not in likely][:2]
            try:
                tops.named = set(unlikely) <= set(tops._ask(ids, tops.count, unlikely, Bill(), attempts=2))
            except ServerError:
                tops.named = False
        further = "any number of them" if tops.wide else "those that are asked for" if tops.named else "no others"
        return tops, f"it names its {tops.count} likeliest next tokens, and {further}"

    def _check(self, ids: Sequence[int]) -> None:
        by_id, by_text = (self._ask(prompt, self.count, (), Bill(), attempts=2) for prompt in (ids, _TRIED))
        best = max(by_id, key=by_id.__getitem__, default=None)
        if best is None or len(by_id) < self.count:
            raise Wrong(f"{len(by_id)} of {self.count} tokens are named")
        if best not in by_text or abs(by_id[best] - by_text[best]) > _CLOSE:
            raise Wrong("a text and its ids have different next tokens; tokenizer= is not the server's")

    def top(self, ids: Sequence[int], bill: Bill, gate: Gate = unguarded, count: int | None = None) -> Top:
        """The likeliest tokens after these ids, `count` or as many as are usual.

        Raises:
            ServerError: the server failed, or names no tokens.
        """
        known = self._ask(ids, count or self.count, (), bill, gate)
        if not known:
            raise Wrong("the server names no next tokens")
        left = 1.0 - math.fsum(map(math.exp, known.values()))
        return Top(known, min(min(known.values()), math.log(max(left, 0.0) + 1e-6)))

    def further(
        self, ids: Sequence[int], top: Top, wanted: Collection[int], bill: Bill, gate: Gate = unguarded
    ) -> Top | None:
        """A top that knows these ids too, or more of the likeliest; None: there are no others to be had."""
        missing = [i for i in wanted if i not in top.known]
        if self.wide:
            if len(top.known) >= len(self._encoder.vocabulary):
                return None
            return self.top(ids, bill, gate, max(WIDE, 16 * len(top.known)))
        if not self.named or not missing:
            return None
        found = self._ask(ids, self.count, missing[:NAMED], bill, gate)
        return Top({**top.known, **found}, top.rest)

    def _ask(
        self,
        prompt: str | Sequence[int],
        count: int,
        named: Sequence[int],
        bill: Bill,
        gate: Gate = unguarded,
        attempts: int = ATTEMPTS,
    ) -> dict[int, float]:
        body: dict[str, Any] = {"model": self._model, "prompt": prompt if isinstance(prompt, str) else list(prompt)}
        body |= {"max_tokens": 1, "temperature": 0, "logprobs": count, "return_tokens_as_token_ids": True}
        if named:
            body["logprob_token_ids"] = list(named)
        answer = self._endpoint.ask("/completions", body, gate, attempts)
        bill.add(answer.get("usage"))
        told = first_choice(answer).get("logprobs") or {}
        size = len(self._encoder.vocabulary)
        found: dict[int, float] = {}
        try:
            if told.get("content"):
                first = told["content"][0]
                pairs = [(one.get("id", one.get("token")), one["logprob"]) for one in [first, *first["top_logprobs"]]]
            else:
                pairs = list(told["top_logprobs"][0].items())
            for token, logprob in pairs:
                i = token if isinstance(token, int) else self._id(str(token))
                if i is not None and 0 <= i < size:
                    found[i] = float(logprob)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise Wrong("the next tokens come in a form that is not known") from None
        return found

    def _id(self, token: str) -> int | None:
        number = token.removeprefix("token_id:")
        return int(number) if number != token and number.isdigit() else self._by_text.get(token)
