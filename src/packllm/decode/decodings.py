"""Decodings: how members write one answer together. All of them are in DECODINGS, as weightings are in WEIGHTINGS."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from packllm.decode.by_segments import by_segments, check_reranked, check_segments, reranked
from packllm.decode.by_tokens import by_tokens, check_drawn, check_tokens, difference, drawn
from packllm.decode.request import Request
from packllm.decode.tokens import Row
from packllm.errors import OptionError, VocabularyError
from packllm.results import Chunk

log = logging.getLogger("packllm")


@dataclass(frozen=True)
class Decoding:
    """One way of decoding.

    Attributes:
        check: raises OptionError or VocabularyError, before anything runs, where it cannot serve a request.
        decode: (row, Chunk) of the rows that are not done; the last chunk of each has a finish_reason. The request is
            read and weighed.
        mapped: members of other vocabularies read and answer in the ids of the one that knows the prompt best. Then
            each prompt has a vocabulary of its own, and is decoded by itself.
    """

    check: Callable[[Request], None]
    decode: Callable[[Request, Sequence[Row]], Generator[tuple[int, Chunk], None, None]]
    mapped: bool = False


def _any(request: Request) -> None:
    """Serves every request."""


def _auto(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """Token by token where the members that run share a vocabulary, else segment by segment."""
    mixed = {r for r in range(len(rows)) if not request.one_vocabulary(request.running(r))}
    needs_one = request.grammar is not None or request.options.penalises
    if mixed and (needs_one or log.isEnabledFor(logging.INFO)):
        told = difference([request.members[k] for k in request.running(min(mixed))])
        if needs_one:
            raise VocabularyError(
                f"{told}; the form that json_schema or tool_choice demands, penalties and logit_bias need one "
                f"vocabulary; use decoding='mined' or weighting='top1'"
            )
        log.info("%s: they write segment by segment (decoding='cool'); decoding='mined' serves too", told)
    for r, row in enumerate(rows):
        row.done = r not in mixed
    yield from by_segments(request, rows)
    for r, row in enumerate(rows):
        row.done = r in mixed
    yield from by_tokens(request, rows)


DECODINGS: dict[str, Decoding] = {
    "auto": Decoding(_any, _auto),
    "tokens": Decoding(check_tokens, by_tokens),
    "lazy": Decoding(check_drawn, drawn),
    "cool": Decoding(check_segments, by_segments),
    "cool+rerank": Decoding(check_reranked, reranked),
    "mined": Decoding(_any, by_tokens, mapped=True),
}


def find(name: str) -> Decoding:
    """The decoding of that name; OptionError with the valid names otherwise."""
    if name not in DECODINGS:
        raise OptionError(f"decoding={name!r} is unknown; valid: {', '.join(DECODINGS)}")
    return DECODINGS[name]
