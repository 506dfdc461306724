"""Log-probabilities of the tokens of a prompt under the pack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor

from packllm.chat.formatted import Tokens
from packllm.chat.messages import Prompt
from packllm.decode.cancel import Stop
from packllm.decode.line import Line
from packllm.decode.logprobs import Recorder
from packllm.decode.request import Request
from packllm.decode.score import BLOCK_BYTES
from packllm.decode.tokens import fused_row, in_one_vocabulary
from packllm.engines.base import Read, Sequence, read_together
from packllm.errors import VocabularyError
from packllm.options import Options
from packllm.pack import Pack
from packllm.results import TokenLogprob, Usage
from packllm.weights import Weights


@dataclass(frozen=True)
class Reading:
    """A prompt's tokens with their fused log-probabilities.

    Attributes:
        texts: text of each token.
        offsets: start of each token in the prompt's text.
        ids: token ids in the first member's vocabulary.
        told: log-probability of each token given the tokens before it; None if a member has no tokens before it.
        ranks: rank of each token, 1 for the most likely.
        weights: the prompt's weights, with which all its tokens are fused.
    """

    texts: list[str]
    offsets: list[int]
    ids: list[int]
    told: list[TokenLogprob | None]
    ranks: list[int]
    weights: Weights

    @property
    def usage(self) -> Usage:
        return Usage(len(self.ids), 0)


def readings(pack: Pack, prompts: Iterable[Prompt], options: dict[str, Any], top: int, cancel: Event) -> list[Reading]:
    """Read prompts one after the other, see read().

    Args:
        options: options of the request; those of its answer do not matter.
    """
    checked = pack.check(**{**options, "max_tokens": None, "logprobs": None, "top_logprobs": top})
    return [read(pack, prompt, checked, top, cancel) for prompt in prompts]


def read(pack: Pack, prompt: Prompt, options: Options, top: int, cancel: Event) -> Reading:
    """Read a prompt once for its weights, and once more for the log-probabilities of its tokens.

    Args:
        top: number of most likely tokens to report at each position.

    Raises:
        VocabularyError: the members do not share a vocabulary, or run on servers. Others as in Pack.stream().
    """
    with closing(pack._request([prompt], options)) as request:
        request.stop = Stop(cancel)
        request.limits(0)
        request.prefill()
        texts, ids, logprobs, ranks = request.run_on_lines(
            lambda lines: _token_logprobs(request, [k for k, _ in lines], top)
        )
        text = Tokens.of(ids, pack.members[0].vocabulary) if not isinstance(prompt, Tokens) else prompt
        return Reading(texts, [start for start, _ in text.offsets], ids, logprobs, ranks, request.weights[0])


def _token_logprobs(
    request: Request, running: list[int], top: int
) -> tuple[list[str], list[int], list[TokenLogprob | None], list[int]]:
    here = request.token_lines(0)
    if len(here) < len(running) or not request.one_vocabulary(running):
        raise VocabularyError(
            "log-probabilities of a prompt's tokens need members that share a vocabulary and run locally; "
            "or request one member by its name"
        )
    speaking, _ = in_one_vocabulary(here)
    own = {k: request.encoded[0][k].ids for k in running}
    reference = request.members[running[0]]
    vocabulary, ids, weights = reference.vocabulary, own[running[0]], request.weights[0]
    shared = _common_suffix({k: [request.members[k].vocabulary.tokens[i] for i in row] for k, row in own.items()})
    recorder = Recorder(vocabulary, (), weights.names, top)
    ranks = [0] * len(ids)
    first = max(1, len(ids) - min(shared, *(len(row) - 1 for row in own.values())))
    sequences = {k: line.member.open() for k, line in here.items()}
    try:
        for sequence in sequences.values():
            sequence.gate = request.check
        step = max(1, BLOCK_BYTES // (4 * reference.vocabulary_size))
        # Members with additional tokens before the text (BOS) read these first.
        rows = {k: own[k][: len(own[k]) - len(ids) + first - 1] for k in running}
        _read({k: sequences[k] for k in running if rows[k]}, rows, here, "none")
        for at in range(first - 1, len(ids) - 1, step):
            stop = min(at + step, len(ids) - 1)
            blocks = {k: own[k][len(own[k]) - len(ids) + at : len(own[k]) - len(ids) + stop] for k in running}
            parts = _read(sequences, blocks, speaking, "all")
            fused = fused_row(parts, weights)
            for place, target in enumerate(ids[at + 1 : stop + 1]):
                recorder.note(target, fused[place], {k: part[place] for k, part in parts.items()})
                ranks[at + 1 + place] = int((fused[place] > fused[place, target]).sum()) + 1
    finally:
        for sequence in sequences.values():
            sequence.close()
    logprobs: list[TokenLogprob | None] = [*[None] * first, *recorder.take()]
    return [vocabulary.tokens[i].decode(errors="replace") for i in ids], ids, logprobs, ranks


def _read(
    sequences: Mapping[int, Sequence], blocks: Mapping[int, list[int]], lines: Mapping[int, Line], want: str
) -> dict[int, Tensor]:
    """Let each member read its block of ids.

    Returns:
        Log-probabilities after each id, (n, V) per member, in shared ids; empty if `want` is "none".

    Raises:
        MemberError: a member failed.
    """
    reads = [Read(sequence, blocks[k], want) for k, sequence in sequences.items()]  # type: ignore[arg-type]
    rows: dict[int, Tensor] = {}
    for k, answer in zip(sequences, read_together(reads), strict=True):
        if isinstance(answer, Exception):
            raise lines[k].member.failed(answer)
        rows[k] = lines[k].in_line_ids(answer) if want == "all" else torch.empty(0)
    return rows


def _common_suffix(spelled: Mapping[int, list[bytes]]) -> int:
    """Number of tokens at the end that all members have in common."""
    rows = list(spelled.values())
    count = 0
    for column in zip(*(reversed(row) for row in rows), strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def as_vllm(reading: Reading, count: int) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: for each token a dict by id, of the token itself and then the most likely ones."""
    listed: list[dict[str, Any] | None] = []
    for token, rank in zip(reading.told, reading.ranks, strict=True):
        if token is None:
            listed.append(None)
            continue
        ranked = [(token, rank), *((one, at + 1) for at, one in enumerate(token.top_logprobs[:count]))]
        entry: dict[str, Any] = {}
        for one, place in ranked:
            details = {"logprob": one.as_dict()["logprob"], "rank": place, "decoded_token": one.token}
            entry.setdefault(str(one.id), details)
        listed.append(entry)
    return listed
