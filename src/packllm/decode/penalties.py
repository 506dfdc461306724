"""Penalties and biases: they change tokens' log-probabilities before one is chosen.

They apply to the fused log-probabilities in this order: repetition_penalty multiplies those of the prompt's and the
answer's tokens (arXiv 1909.05858); presence_penalty and frequency_penalty are subtracted from those of the answer's
tokens (OpenAI's rule); biases are added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from packllm.decode.sampling import Sampler
from packllm.engines.member import Author
from packllm.errors import OptionError, shown
from packllm.options import Options


class Penalties:
    """The penalties and biases of one answer. They count its tokens.

    Args:
        options: repetition_penalty, presence_penalty and frequency_penalty.
        prompt: ids of the prompt.
        biases: in nats, by id.
    """

    def __init__(self, options: Options, prompt: Collection[int], biases: Mapping[int, float]) -> None:
        self._repetition = options.repetition_penalty
        self._presence, self._frequency = options.presence_penalty, options.frequency_penalty
        self._prompt, self._biases = frozenset(prompt), biases
        self._counts: Counter[int] = Counter()

    def wrap(self, sample: Sampler) -> Sampler:
        """A sampler that calls `sample` with the penalised log-probabilities."""

        def penalised(logprobs: Tensor) -> int:
            token = sample(self.shaped(logprobs))
            self._counts[token] += 1
            return token

        return penalised

    def shaped(self, logprobs: Tensor) -> Tensor:
        """Penalise log-probabilities (V,); the result is not normalised."""
        shaped = logprobs.clone()
        if self._repetition != 1.0:
            shaped[_valid_ids(self._prompt | self._counts.keys(), logprobs)] *= self._repetition
        if self._counts and (self._presence or self._frequency):
            penalties = {token: self._presence + self._frequency * count for token, count in self._counts.items()}
            _add(shaped, {token: -nats for token, nats in penalties.items()})
        _add(shaped, self._biases)
        return shaped


def _valid_ids(ids: Collection[int], logprobs: Tensor) -> Tensor:
    return torch.tensor(sorted(i for i in ids if i < len(logprobs)), dtype=torch.long, device=logprobs.device)


def _add(logprobs: Tensor, nats: Mapping[int, float]) -> None:
    ids = _valid_ids(nats, logprobs)
    logprobs[ids] += torch.tensor([nats[i] for i in ids.tolist()], dtype=logprobs.dtype, device=logprobs.device)


def spelled_biases(biases: Mapping[int | str, float] | None, member: Author) -> dict[bytes, float]:
    """The option logit_bias by the bytes of its tokens, so that it holds in every vocabulary.

    Args:
        member: the member whose ids the option uses.

    Raises:
        OptionError: an id has no token.
    """
    spelled: dict[bytes, float] = {}
    for key, nats in (biases or {}).items():
        told = f"logit_bias={{{key!r}: {nats:g}}}"
        token = key.encode(errors="surrogatepass") if isinstance(key, str) else spelling(key, member, told)
        if not token:
            raise OptionError(f"{told}: it names no token")
        spelled[token] = nats
    return spelled


def spelling(i: int, member: Author, told: str) -> bytes:
    """What a token of a member spells.

    Args:
        told: the option that names it.

    Raises:
        OptionError: an id without a token.
    """
    tokens, size = member.vocabulary.tokens, member.vocabulary_size
    if i >= size or not tokens[i]:
        raise OptionError(
            f"{told}: member {member.name!r} has no such token; its ids go from 0 to {size - 1}, Pack.tokenize gives "
            f"those of a text"
        )
    return tokens[i]


def named_ids(ids: Sequence[int], member: Author, reference: Author, end: int | None) -> list[int]:
    """The option logprob_token_ids, which has a member's ids, as bias_ids() gives ids.

    Raises:
        OptionError: what is no token of the reference.
    """
    if not ids or reference is member:
        return [end if i in reference.end_ids and end is not None else i for i in ids]
    spelled = {i: spelling(i, member, f"logprob_token_ids={i}") for i in ids}
    own: dict[bytes, int] = {}
    for i, token in enumerate(reference.vocabulary.tokens[: reference.vocabulary_size]):
        own.setdefault(token, i)
    if unknown := [i for i, token in spelled.items() if token not in own]:
        raise OptionError(
            f"logprob_token_ids={unknown[0]}: it is no token of member {reference.name!r}, in whose ids "
            f"the pack answers"
        )
    return named_ids([own[spelled[i]] for i in ids], reference, reference, end)


def bias_ids(spelled: Mapping[bytes, float], member: Author, end: int | None) -> dict[int, float]:
    """Biases by id.

    Args:
        spelled: nats by the bytes of a token.
        member: the member whose ids the fused distribution uses.
        end: the id that stands for all end ids; None: each stands for itself.

    Raises:
        OptionError: a bias is for bytes that are no token of that member.
    """
    if not spelled:
        return {}
    tokens = {
        i: token for i, token in enumerate(member.vocabulary.tokens[: member.vocabulary_size]) if token in spelled
    }
    for token, nats in spelled.items():
        if token not in tokens.values():
            text = token.decode(errors="replace")
            raise OptionError(
                f"logit_bias={{{shown(text)}: {nats:g}}}: it is not one token of member {member.name!r}, whose ids "
                f"the pack uses, but {member.encoder.plain(text)}; name one token, white space before it included"
            )
    shared = member.end_ids if end is not None else ()
    return {end if i in shared and end is not None else i: spelled[token] for i, token in tokens.items()}
