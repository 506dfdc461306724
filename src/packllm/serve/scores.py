"""POST /v1/score, /v1/rerank and /v1/decisions: log-likelihoods of given texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event
from typing import Any, TypeVar

from packllm.asynchronous import in_thread
from packllm.chat.messages import Prompt
from packllm.errors import OptionError, PromptError
from packllm.serve.answers import new_id
from packllm.serve.models import Served
from packllm.serve.protocol import Decide, Rerank, Score
from packllm.serve.reply import Events

T = TypeVar("T")

_LEAST = -9999.0  # stands for -infinity, which JSON does not have; other servers use it too


async def score(served: Served, body: Score) -> Events:
    """Pack.score for pairs of texts: one text_1 with all text_2, all text_1 with one text_2, or pairwise."""
    firsts, seconds = body.texts(body.text_1), body.texts(body.text_2)
    if len(firsts) == 1:
        pairs = [(firsts[0], seconds)]
    elif len(seconds) == 1:
        pairs = [(first, seconds) for first in firsts]
    elif len(firsts) == len(seconds):
        pairs = [(first, [second]) for first, second in zip(firsts, seconds, strict=True)]
    else:
        raise OptionError(
            f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}; give one text in either, or equally many"
        )
    results: list[float] = []
    for first, texts in pairs:
        work = partial(served.pack.score, first, texts, **body.options())
        results += await in_thread(partial(_cancellable, work))
    data = [{"index": at, "object": "score", "score": max(value, _LEAST)} for at, value in enumerate(results)]
    spoken = [(first, text) for first, texts in pairs for text in texts]
    usage = await _usage(served, [text for pair in spoken for text in pair])
    yield {"id": new_id("score-"), "object": "list", "model": served.name, "data": data, "usage": usage}


async def rerank(served: Served, body: Rerank) -> Events:
    """Rank documents by their log-likelihood per byte after the query, best first."""
    texts = body.documents_as_texts
    work = partial(served.pack.score, body.query, texts, **body.options())
    scores = await in_thread(partial(_cancellable, work))
    rated = [value / len(text.encode()) for text, value in zip(texts, scores, strict=True)]
    order = sorted(range(len(texts)), key=lambda at: -rated[at])[: body.top_n or None]
    results: list[dict[str, Any]] = []
    for at in order:
        document = {"document": {"text": texts[at]}} if body.return_documents else {}
        results.append({"index": at, "relevance_score": max(rated[at], _LEAST), **document})
    yield {
        "id": new_id("rerank-"),
        "model": served.name,
        "results": results,
        "usage": await _usage(served, [body.query, *texts]),
    }


async def decide(served: Served, body: Decide) -> Events:
    """Pack.decide."""
    if (body.prompt is None) == (body.messages is None):
        raise PromptError("give either prompt or messages")
    prompt: Prompt = body.messages or body.prompt or ""
    result = await served.pack.adecide(prompt, body.choices, calibrated=body.calibrated, **body.options())
    yield {"id": new_id("decision-"), "object": "decision", "model": served.name, **result.as_dict()}


def _cancellable(work: Callable[..., T], cancel: Event) -> T:
    return work(cancel=cancel)


async def _usage(served: Served, texts: list[str]) -> dict[str, int]:
    count = await in_thread(lambda _: sum(len(served.pack.tokenize(text)) for text in texts))
    return {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
