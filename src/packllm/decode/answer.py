"""The answers of a request: prefill, weights, then decoding into chunks of text."""

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
    """Prefill, then decode: yield (row, Chunk) until all rows are finished; a prompt has n rows. The reasoning before
    an answer is separated from its text. With adaptive weights, a row's first chunk has the weights from before the
    answer. The last chunk has the explanation, if the options ask for one.

    Closing the iterator frees the caches, after the decode step in progress at most.

    Raises:
        AnswerTimeout: see Request.check_time.
    """
    started: set[int] = set()
    with closing(_pieces(request, decoding)) as pieces:
        separated = apart(request, pieces)
        for r, chunk in explained(request, separated) if request.options.explains else separated:
            first = r not in started and chunk.finish_reason is None
            started.add(r)
            yield r, replace(chunk, weights=chunk.weights.at_start) if first else chunk


def _pieces(request: Request, decoding: Decoding) -> Generator[tuple[int, Chunk], None, None]:
    """As chunks(), with reasoning still part of the text."""
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
