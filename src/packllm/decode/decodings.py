"""Decodings: how members write one answer together. DECODINGS lists them, as WEIGHTINGS lists the weightings."""

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
        check: raises OptionError or VocabularyError if it cannot serve a request, before anything runs.
        decode: decodes the unfinished rows and yields (row, Chunk); each row's last chunk has a finish_reason. The
            request is prefilled and has its weights.
        mapped: members with other vocabularies are mapped to the ids of the reference, the member with the lowest
            perplexity on the prompt. Then each prompt has its own vocabulary and is decoded by itself.
    """

    check: Callable[[Request], None]
    decode: Decode
    mapped: bool = False


def _any(request: Request) -> None:
    """Accept every request."""


def named(name: str, decode: Decode) -> Decode:
    """`decode`, with `name` as the decoding in its last chunks."""

    def decode_named(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
        with closing(decode(request, rows)) as chunks:
            for r, chunk in chunks:
                yield r, chunk if chunk.finish_reason is None else replace(chunk, decoding=name)

    return decode_named


_TOKENS, _PROVED, _COOL = named("tokens", by_tokens), named("tokens", proved), named("cool", by_segments)


def _auto(request: Request, rows: Sequence[Row]) -> Generator[tuple[int, Chunk], None, None]:
    """The finest decoding that all running members support: token by token if they are token models with one
    vocabulary, else segment by segment."""
    ways = {r: _finest(request, r) for r in range(len(rows))}
    mixed = [r for r, way in ways.items() if way is not _TOKENS]
    needs_one = request.grammar is not None or request.options.penalises
    if mixed and (needs_one or log.isEnabledFor(logging.INFO)):
        problem = difference([request.members[k] for k in request.running(mixed[0])])
        if needs_one:
            raise VocabularyError(
                f"{problem}; json_schema, tool_choice='required', penalties and logit_bias need one vocabulary; "
                f"use decoding='mined' or weighting='top1'"
            )
        if ways[mixed[0]] is _COOL:
            log.info("%s: decoding segment by segment (decoding='cool'); decoding='mined' is possible too", problem)
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
    some_remote = any(not request.one_vocabulary(request.running(r)) for r in range(len(rows)))
    yield from (_PROVED if some_remote else _TOKENS)(request, rows)


DECODINGS: dict[str, Decoding] = {
    "auto": Decoding(_any, _auto),
    "tokens": Decoding(check_tokens, _tokens),
    "lazy": Decoding(check_drawn, named("lazy", drawn)),
    "cool": Decoding(check_segments, _COOL),
    "cool+rerank": Decoding(check_reranked, named("cool+rerank", reranked)),
    "mined": Decoding(check_models, named("mined", by_tokens), mapped=True),
}


def find(name: str) -> Decoding:
    """The decoding of that name. Raise OptionError with the valid names if there is none."""
    if name not in DECODINGS:
        raise OptionError(f"decoding={name!r} is unknown; valid: {', '.join(DECODINGS)}")
    return DECODINGS[name]
