"""What an answer's tokens were given: by the pack, and by each member."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary
from packllm.results import TokenLogprob

_RULED_OUT = -1e20
"""Below this, a token cannot come: a form's or a bias's -infinity."""


class Recorder:
    """Keeps the log-probabilities of one answer's tokens.

    Args:
        vocabulary: what the tokens mean.
        ends: ids that end an answer; the one that does is kept apart.
        names: of the members, by index.
        top: how many alternatives to keep for each token.

    Attributes:
        end: of the token that ended the answer.
    """

    def __init__(self, vocabulary: Vocabulary, ends: Collection[int], names: Sequence[str], top: int) -> None:
        self._vocabulary, self._ends, self._names, self._top = vocabulary, ends, names, top
        self.end: TokenLogprob | None = None
        self._kept: list[TokenLogprob] = []
        self._seen: Tensor | None = None

    def watching(self, sample: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
        """A sampler that chooses as `sample` does. What it is first asked to choose the next token from is what
        note() goes by: the fused distribution, shaped by penalties or a form."""

        def watched(logprobs: Tensor) -> int:
            if self._seen is None:
                self._seen = logprobs.clone()  # a form strikes out what leaves no room
            return sample(logprobs)

        return watched

    def note(self, token: int, fused: Tensor, parts: Mapping[int, Tensor]) -> None:
        """Keep a token that was chosen.

        Args:
            fused: (V,) log-probabilities.
            parts: by index of the member, (V_k,) its log-probabilities.
        """
        seen, self._seen = fused if self._seen is None else self._seen, None
        logprobs = seen.log_softmax(-1)
        best, ids = torch.topk(logprobs, min(self._top, len(logprobs)))
        top = [i for i, value in zip(ids.tolist(), best.tolist(), strict=True) if value > _RULED_OUT]
        asked = [token, *top]
        given = logprobs[asked].tolist()
        members = {self._names[k]: part[asked].tolist() for k, part in sorted(parts.items())}
        told = [
            self._told(i, given[at], {name: values[at] for name, values in members.items()})
            for at, i in enumerate(asked)
        ]
        noted = replace(told[0], top_logprobs=tuple(told[1:]))
        if token in self._ends:
            self.end = noted
        else:
            self._kept.append(noted)

    def _told(self, token: int, logprob: float, members: dict[str, float]) -> TokenLogprob:
        spelled, text = b"", b""
        if token < len(self._vocabulary):
            spelled, text = self._vocabulary.tokens[token], self._vocabulary.text_bytes(token)
        return TokenLogprob(spelled.decode(errors="replace"), tuple(text), token, logprob, members)

    def take(self) -> tuple[TokenLogprob, ...]:
        """What was kept since the last time."""
        kept, self._kept = tuple(self._kept), []
        return kept
