"""The most likely next tokens from a server, as token ids; this requires that the server's tokenizer is known."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packllm.chat.prompt import Encoder
from packllm.engines.server.answers import UnusableAnswer, first_choice
from packllm.engines.server.http import ATTEMPTS, Endpoint, Gate, ServerError, no_gate
from packllm.results import Bill

COUNTS = (20, 5)
"""Numbers of tokens to request, tried in order: vLLM returns at most 20, other servers 5."""

WIDE = 1000
"""Number of tokens to request from a server without a limit (llama-server); more tokens cost no extra time."""

NAMED = 128
"""Most ids that vLLM accepts in `logprob_token_ids`."""

_TRIED = "The capital of France is"
_CLOSE = 0.2


@dataclass(frozen=True)
class Top:
    """Log-probabilities of some next tokens by id (known), and an upper bound for every other token (rest)."""

    known: Mapping[int, float]
    rest: float


class Tops:
    """Reads the most likely next tokens from a server.

    Args:
        count: number of tokens that the server returns.
        wide: whether it returns any number of tokens.
        named: whether it returns log-probabilities of requested ids.
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
        """Test which next tokens a server returns.

        Returns:
            The reader, or None if the server's token ids are not the encoder's; and a sentence that says what was
            found.
        """
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
            return None, f"it does not return its most likely next tokens as ids of the tokenizer: {reason}"
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
        further = "any number of them" if tops.wide else "requested ids" if tops.named else "no others"
        return tops, f"it returns its {tops.count} most likely next tokens, and {further}"

    def _check(self, ids: Sequence[int]) -> None:
        by_id, by_text = (self._ask(prompt, self.count, (), Bill(), attempts=2) for prompt in (ids, _TRIED))
        best = max(by_id, key=by_id.__getitem__, default=None)
        if best is None or len(by_id) < self.count:
            raise UnusableAnswer(f"{len(by_id)} of {self.count} tokens are returned")
        if best not in by_text or abs(by_id[best] - by_text[best]) > _CLOSE:
            raise UnusableAnswer("a text and its ids have different next tokens: tokenizer= is not the server's")

    def top(self, ids: Sequence[int], bill: Bill, gate: Gate = no_gate, count: int | None = None) -> Top:
        """The `count` most likely tokens after a prompt of these ids; by default as many as the server returns at once.

        Raises:
            ServerError: the server failed, or returned no tokens.
        """
        known = self._ask(ids, count or self.count, (), bill, gate)
        if not known:
            raise UnusableAnswer("the server returned no next tokens")
        left = 1.0 - math.fsum(map(math.exp, known.values()))
        return Top(known, min(min(known.values()), math.log(max(left, 0.0) + 1e-6)))

    def further(
        self, ids: Sequence[int], top: Top, wanted: Collection[int], bill: Bill, gate: Gate = no_gate
    ) -> Top | None:
        """A Top extended by the wanted ids, or by more likely tokens; None if the server returns no others."""
        missing = [i for i in wanted if i not in top.known]
        if self.wide:
            if len(top.known) >= len(self._encoder.vocabulary):
                return None
            return self.top(ids, bill, gate, max(WIDE, 16 * len(top.known)))
        if not self.named or not missing:
            return None
        logprobs = self._ask(ids, self.count, missing[:NAMED], bill, gate)
        return Top({**top.known, **logprobs}, top.rest)

    def _ask(
        self,
        prompt: str | Sequence[int],
        count: int,
        named: Sequence[int],
        bill: Bill,
        gate: Gate = no_gate,
        attempts: int = ATTEMPTS,
    ) -> dict[int, float]:
        body: dict[str, Any] = {"model": self._model, "prompt": prompt if isinstance(prompt, str) else list(prompt)}
        body |= {"max_tokens": 1, "temperature": 0, "logprobs": count, "return_tokens_as_token_ids": True}
        if named:
            body["logprob_token_ids"] = list(named)
        answer = self._endpoint.ask("/completions", body, gate, attempts)
        bill.add(answer.get("usage"))
        record = first_choice(answer).get("logprobs") or {}
        size = len(self._encoder.vocabulary)
        logprobs: dict[int, float] = {}
        try:
            if record.get("content"):
                first = record["content"][0]
                pairs = [(one.get("id", one.get("token")), one["logprob"]) for one in [first, *first["top_logprobs"]]]
            else:
                pairs = list(record["top_logprobs"][0].items())
            for token, logprob in pairs:
                i = token if isinstance(token, int) else self._id(str(token))
                if i is not None and 0 <= i < size:
                    logprobs[i] = float(logprob)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise UnusableAnswer("the server returns the next tokens in an unknown form") from None
        return logprobs

    def _id(self, token: str) -> int | None:
        number = token.removeprefix("token_id:")
        return int(number) if number != token and number.isdigit() else self._by_text.get(token)
