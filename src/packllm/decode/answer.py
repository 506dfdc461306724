"""Answers: a request that is read and weighed, decoded into pieces of text."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

from packllm.decode.decodings import Decoding
from packllm.decode.explain import explained
from packllm.decode.moving import moving
from packllm.decode.reasoned import apart
from packllm.decode.request import Request
from packllm.decode.sampling import make_sampler
from packllm.decode.tokens import Row
from packllm.results import Chunk


def chunks(request: Request, decoding: Decoding) -> Generator[tuple[int, Chunk], None, None]:
    """Prefill, then decode: pieces of text as (row, Chunk), n rows a prompt, until all are finished. What is reasoned
    before the answer of a conversation comes apart from its text. Where weights move, the first piece has those that
    the answer started from; the last one explains the answer, if asked for.

    Closing the iterator frees the caches; at most the step under way is finished.

    Raises:
        AnswerTimeout: see Request.check_time.
    """
    begun: set[int] = set()
    with closing(_pieces(request, decoding)) as pieces:
        told = apart(request, pieces)
        for r, chunk in explained(request, told) if request.options.explains else told:
            first = r not in begun and chunk.finish_reason is None
            begun.add(r)
            yield r, replace(chunk, weights=chunk.weights.at_start) if first else chunk


def _pieces(request: Request, decoding: Decoding) -> Generator[tuple[int, Chunk], None, None]:
    """As chunks(), with all that is written as text."""
    try:
        with request.admission.admitted(request.cache_bytes(), request.check):
            request.prefill()
            request.fork()
            options = request.options
            limits = request.limits(options.max_tokens)
            filters = options.temperature, options.top_p, options.top_k
            rows = [
                Row(
                    weights,
                    make_sampler(*filters, options.seed_of(r), options.min_p),
                    limit,
                    moving=moving(options, weights),
                )
                for r, (weights, limit) in enumerate(zip(request.weights, limits, strict=True))
            ]
            yield from decoding.decode(request, rows)
    finally:
        request.close()
