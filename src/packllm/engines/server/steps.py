"""Judging one token at a time, for servers that report the next tokens but no log-probabilities of prompts
(llama-server)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial

from packllm.align.words import offsets
from packllm.chat.prompt import Encoder
from packllm.engines.server.answers import TextLogprobs
from packllm.engines.server.http import Gate, no_gate, together
from packllm.engines.server.judge import Asked
from packllm.engines.server.tops import WIDE, Tops
from packllm.results import Bill

MOST = 64
"""Longest text in tokens that is judged this way. Each token costs a request."""


class Steps:
    """A Judge for texts of at most MOST tokens.

    A token that is not among the WIDE most likely ones gets the log-probability of the last of them, an upper bound.

    Args:
        ends: ids that end an answer.
    """

    def __init__(self, tops: Tops, encoder: Encoder, ends: Collection[int]) -> None:
        self._tops, self._encoder, self._ends = tops, encoder, ends

    def score(self, asked: Asked, bill: Bill, gate: Gate = no_gate) -> TextLogprobs | None:
        """See Judge.score; the end has log-probability -inf."""
        if not 0 < len(asked.positions) <= MOST:
            return None
        logprobs = [self._logprob(asked.ids[:at], [asked.ids[at]], bill, gate) for at in asked.positions]
        return TextLogprobs(asked.starts, asked.ends, logprobs, -math.inf)

    def judge(
        self, asked: Asked, before: str, texts: Sequence[str], bill: Bill, gate: Gate = no_gate
    ) -> list[TextLogprobs | None]:
        """See Judge.judge; the result is None also for a text longer than MOST tokens."""
        start = [*asked.ids, *self._encoder.continuation(before)]
        return together([partial(self._judge_one, start, text, bill, gate) for text in texts])

    def _judge_one(self, start: Sequence[int], text: str, bill: Bill, gate: Gate) -> TextLogprobs | None:
        ids = self._encoder.continuation(text)
        if len(ids) > MOST:
            return None
        logprobs = [self._logprob([*start, *ids[:n]], [ids[n]], bill, gate) for n in range(len(ids))]
        cuts = offsets(text, [self._encoder.vocabulary.text_bytes(i) for i in ids])
        starts, ends = cuts or ([0] * len(ids), [len(text)] * len(ids))
        return TextLogprobs(starts, ends, logprobs, self._logprob([*start, *ids], self._ends, bill, gate))

    def _logprob(self, ids: Sequence[int], targets: Collection[int], bill: Bill, gate: Gate) -> float:
        """The log-probability that one of the target ids follows the ids."""
        top = self._tops.top(ids, bill, gate, WIDE)
        known = [top.known[i] for i in targets if i in top.known] or [top.rest]
        return max(known) + math.log(math.fsum(math.exp(p - max(known)) for p in known))
