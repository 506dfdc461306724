"""What makes tokens more or less likely before one is chosen: those that came already, and biases.

Applied to the fused log-probabilities in this order: tokens of the prompt and the answer times repetition_penalty
(arXiv 1909.05858), less presence_penalty and frequency_penalty for those of the answer (OpenAI's rule), plus biases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from packllm.decode.sampling import Sampler
from packllm.engines.member import Author
from packllm.errors import OptionError, shown
from packllm.options import Options


class Penalties:
    """The penalties and biases of one answer; they remember its tokens.

    Args:
        options: repetition_penalty, presence_penalty and frequency_penalty.
        prompt: ids of the prompt.
        biases: nats by id.
    """

    def __init__(self, options: Options, prompt: Collection[int], biases: Mapping[int, float]) -> None:
        self._repetition = options.repetition_penalty
        self._presence, self._frequency = options.presence_penalty, options.frequency_penalty
        self._prompt, self._biases = frozenset(prompt), biases
        self._counts: Counter[int] = Counter()

    def wrap(self, sample: Sampler) -> Sampler:
        """A sampler that chooses as `sample` does, from penalised log-probabilities."""

        def penalised(logprobs: Tensor) -> int:
            token = sample(self.shaped(logprobs))
            self._counts[token] += 1
            return token

        return penalised

    def shaped(self, logprobs: Tensor) -> Tensor:
        """(V,) log-probabilities, not normalised, of normalised ones."""
        shaped = logprobs.clone()
        if self._repetition != 1.0:
            shaped[_known(self._prompt | self._counts.keys(), logprobs)] *= self._repetition
        if self._counts and (self._presence or self._frequency):
            off = {token: self._presence + self._frequency * count for token, count in self._counts.items()}
            _add(shaped, {token: -nats for token, nats in off.items()})
        _add(shaped, self._biases)
        return shaped


def _known(ids: Collection[int], logprobs: Tensor) -> Tensor:
    return torch.tensor(sorted(i for i in ids if i < len(logprobs)), dtype=torch.long, device=logprobs.device)


def _add(logprobs: Tensor, nats: Mapping[int, float]) -> None:
    ids = _known(nats, logprobs)
    logprobs[ids] += torch.tensor([nats[i] for i in ids.tolist()], dtype=logprobs.dtype, device=logprobs.device)


def spelled_biases(biases: Mapping[int | str, float] | None, member: Author) -> dict[bytes, float]:
    """The option logit_bias by what the tokens spell, so that it holds in every vocabulary.

    Args:
        member: whose ids it has.

    Raises:
        OptionError: an id without a token.
    """
    tokens, spelled = member.vocabulary.tokens, {}
    for key, nats in (biases or {}).items():
        token = key.encode() if isinstance(key, str) else tokens[key] if key < len(tokens) else b""
        if not token:
            raise OptionError(
                f"logit_bias={{{key!r}: {nats:g}}}: member {member.name!r} has no such token; its ids go from 0 to "
                f"{len(tokens) - 1}, Pack.tokenize gives those of a text"
            )
        spelled[token] = nats
    return spelled


def bias_ids(spelled: Mapping[bytes, float], member: Author, end: int | None) -> dict[int, float]:
    """Biases by id.

    Args:
        member: whose ids the fused distribution has.
        end: the id that stands for all of its end ids there; None: each for itself.

    Raises:
        OptionError: what is no token of that member.
    """
    if not spelled:
        return {}
    found = {i: token for i, token in enumerate(member.vocabulary.tokens[: member.vocabulary_size]) if token in spelled}
    for token, nats in spelled.items():
        if token not in found.values():
            text = token.decode(errors="replace")
            raise OptionError(
                f"logit_bias={{{shown(text)}: {nats:g}}}: it is not one token of member {member.name!r}, in whose ids "
                f"the pack answers, but {member.encoder.plain(text)}; name one token, white space before it included"
            )
    shared = member.end_ids if end is not None else ()
    return {end if i in shared and end is not None else i: spelled[token] for i, token in found.items()}
