"""Judging token by token, where a server tells nothing of prompts, but any number of the next tokens (llama-server)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial

from packllm.align.words import offsets
from packllm.chat.prompt import Encoder
from packllm.engines.server.answers import Given
from packllm.engines.server.http import Gate, together, unguarded
from packllm.engines.server.judge import Asked
from packllm.engines.server.tops import WIDE, Tops
from packllm.results import Bill

MOST = 64
"""Tokens of a text that is judged so: each costs a request and a step."""


class Steps:
    """As Judge, of texts of at most MOST tokens.

    A token that is not among the likeliest WIDE ones counts as the last of these: what it has is at most that.

    Args:
        ends: ids that end an answer.
    """

    def __init__(self, tops: Tops, encoder: Encoder, ends: Collection[int]) -> None:
        self._tops, self._encoder, self._ends = tops, encoder, ends

    def score(self, asked: Asked, bill: Bill, gate: Gate = unguarded) -> Given | None:
        """See Judge.score; the end is left open."""
        if not 0 < len(asked.positions) <= MOST:
            return None
        given = [self._given(asked.ids[:at], [asked.ids[at]], bill, gate) for at in asked.positions]
        return Given(asked.starts, asked.ends, given, -math.inf)

    def judge(
        self, asked: Asked, before: str, texts: Sequence[str], bill: Bill, gate: Gate = unguarded
    ) -> list[Given | None]:
        """See Judge.judge."""
        start = [*asked.ids, *self._encoder.continuation(before)]
        return together([partial(self._judged, start, text, bill, gate) for text in texts])

    def _judged(self, start: Sequence[int], text: str, bill: Bill, gate: Gate) -> Given | None:
        ids = self._encoder.continuation(text)
        if len(ids) > MOST:
            return None
        given = [self._given([*start, *ids[:n]], [ids[n]], bill, gate) for n in range(len(ids))]
        cuts = offsets(text, [self._encoder.vocabulary.text_bytes(i) for i in ids])
        starts, ends = cuts or ([0] * len(ids), [len(text)] * len(ids))
        return Given(starts, ends, given, self._given([*start, *ids], self._ends, bill, gate))

    def _given(self, ids: Sequence[int], targets: Collection[int], bill: Bill, gate: Gate) -> float:
        """The log-probability that one of these comes after the ids."""
        top = self._tops.top(ids, bill, gate, WIDE)
        known = [top.known[i] for i in targets if i in top.known] or [top.rest]
        return max(known) + math.log(math.fsum(math.exp(p - max(known)) for p in known))
