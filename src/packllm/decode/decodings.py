"""Decodings: how members write one answer together. All of them are in DECODINGS, as weightings are in WEIGHTINGS."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from packllm.decode.by_segments import by_segments, check_reranked, check_segments, reranked
from packllm.decode.by_tokens import by_tokens, check_drawn, check_models, check_tokens, difference, drawn, proved
from packllm.decode.request import Request
from packllm.decode.tokens import Row
from packllm.errors import OptionError, VocabularyError
from packllm.results import Chunk

log = logging.getLogger("packllm")

Decode = Callable[[Request, Sequence[Row]], Generator[tuple[int, Chunk], None, None]]


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
    decode: Decode
    mapped: bool = False


def _any(request: Request) -> None:
    """Serves every request."""


def _named(name: str, decode: Decode) -> Decode:
    """As `decode`; its last chunks say the name."""

    def told(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
        with closing(decode(request, rows)) as chunks:
            for r, chunk in chunks:
                yield r, chunk if chunk.finish_reason is None else replace(chunk, decoding=name)

    return told


_TOKENS, _PROVED, _COOL = _named("tokens", by_tokens), _named("tokens", proved), _named("cool", by_segments)


def _auto(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """The finest way that all members that run support: token by token where they are token models of one vocabulary,
    else segment by segment."""
    ways = {r: _finest(request, r) for r in range(len(rows))}
    mixed = [r for r, way in ways.items() if way is not _TOKENS]
    needs_one = request.grammar is not None or request.options.penalises
    if mixed and (needs_one or log.isEnabledFor(logging.INFO)):
        told = difference([request.members[k] for k in request.running(mixed[0])])
        if needs_one:
            raise VocabularyError(
                f"{told}; the form that json_schema or tool_choice demands, penalties and logit_bias need one "
                f"vocabulary; use decoding='mined' or weighting='top1'"
            )
        if ways[mixed[0]] is _COOL:
            log.info("%s: they write segment by segment (decoding='cool'); decoding='mined' serves too", told)
    for way in (_COOL, _PROVED, _TOKENS):
        for r, row in enumerate(rows):
            row.done = ways[r] is not way
        yield from way(request, rows)


def _finest(request: Request, row: int) -> Decode:
    running = request.running(row)
    if request.one_vocabulary(running):
        return _TOKENS
    return _PROVED if request.provable(running) else _COOL


def _tokens(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    far = any(not request.one_vocabulary(request.running(r)) for r in range(len(rows)))
    yield from (_PROVED if far else _TOKENS)(request, rows)


DECODINGS: dict[str, Decoding] = {
    "auto": Decoding(_any, _auto),
    "tokens": Decoding(check_tokens, _tokens),
    "lazy": Decoding(check_drawn, _named("lazy", drawn)),
    "cool": Decoding(check_segments, _COOL),
    "cool+rerank": Decoding(check_reranked, _named("cool+rerank", reranked)),
    "mined": Decoding(check_models, _named("mined", by_tokens), mapped=True),
}


def find(name: str) -> Decoding:
    """The decoding of that name; OptionError with the valid names otherwise."""
    if name not in DECODINGS:
        raise OptionError(f"decoding={name!r} is unknown; valid: {', '.join(DECODINGS)}")
    return DECODINGS[name]
