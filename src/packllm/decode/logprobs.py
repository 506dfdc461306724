"""The log-probabilities of an answer's tokens: the pack's and each member's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary
from packllm.results import TokenLogprob

_RULED_OUT = -1e20
"""A token below this cannot come: a grammar or a bias of -infinity excludes it."""


class Recorder:
    """Records the log-probabilities of one answer's tokens.

    Args:
        vocabulary: the vocabulary of the token ids.
        ends: ids that end an answer; the end token is recorded in `end`.
        names: the members' names, by index.
        top: how many alternatives to record for each token.
        named: ids to record for each token instead.

    Attributes:
        end: the record of the end token, once it has come.
    """

    def __init__(
        self, vocabulary: Vocabulary, ends: Collection[int], names: Sequence[str], top: int, named: Sequence[int] = ()
    ) -> None:
        self._vocabulary, self._ends, self._names, self._top, self._named = vocabulary, ends, names, top, named
        self.end: TokenLogprob | None = None
        self._records: list[TokenLogprob] = []
        self._distribution: Tensor | None = None

    def watching(self, sample: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
        """A sampler that chooses as `sample` does. note() then records the first distribution that it gets for a token:
        the fused one after penalties or a grammar."""

        def watched(logprobs: Tensor) -> int:
            if self._distribution is None:
                self._distribution = logprobs.clone()  # a grammar may retry, without the tokens that are too long
            return sample(logprobs)

        return watched

    def note(self, token: int, fused: Tensor, parts: Mapping[int, Tensor]) -> None:
        """Record a chosen token.

        Args:
            fused: (V,), fused log-probabilities.
            parts: (V_k,), each member's log-probabilities, by index of the member.
        """
        distribution, self._distribution = fused if self._distribution is None else self._distribution, None
        logprobs = distribution.log_softmax(-1)
        best, ids = torch.topk(logprobs, min(self._top, len(logprobs)))
        top = [i for i, value in zip(ids.tolist(), best.tolist(), strict=True) if value > _RULED_OUT]
        reported = [token, *(self._named or top)]
        fused_values = logprobs[reported].tolist()
        members = {self._names[k]: part[reported].tolist() for k, part in sorted(parts.items())}
        records = [
            self._record(i, fused_values[at], {name: values[at] for name, values in members.items()})
            for at, i in enumerate(reported)
        ]
        record = replace(records[0], top_logprobs=tuple(records[1:]))
        if token in self._ends:
            self.end = record
        else:
            self._records.append(record)

    def _record(self, token: int, logprob: float, members: dict[str, float]) -> TokenLogprob:
        spelling, text = b"", b""
        if token < len(self._vocabulary):
            spelling, text = self._vocabulary.tokens[token], self._vocabulary.text_bytes(token)
        return TokenLogprob(spelling.decode(errors="replace"), tuple(text), token, logprob, members)

    def take(self) -> tuple[TokenLogprob, ...]:
        """The records since the last call."""
        records, self._records = tuple(self._records), []
        return records
