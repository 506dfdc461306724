"""POST /v1/score, /v1/rerank and /v1/decisions: log-likelihoods of given texts."""

from __future__ import annotations

from typing import Any

from packllm.chat.messages import Prompt
from packllm.errors import OptionError, PromptError
from packllm.serve.answers import new_id
from packllm.serve.metrics import Call
from packllm.serve.models import Served
from packllm.serve.protocol import Decide, Rerank, Score
from packllm.serve.reply import Events

_LEAST = -9999.0  # stands for -infinity, which JSON does not have; other servers use it too


def score(served: Served, body: Score, call: Call) -> Events:
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
        results += served.pack.score(first, texts, cancel=call.cancel, **body.options())
    data = [{"index": at, "object": "score", "score": max(value, _LEAST)} for at, value in enumerate(results)]
    spoken = [(first, text) for first, texts in pairs for text in texts]
    usage = _usage(served, [text for pair in spoken for text in pair], call)
    yield {"id": new_id("score-"), "object": "list", "model": served.name, "data": data, "usage": usage}


def rerank(served: Served, body: Rerank, call: Call) -> Events:
    """Rank documents by their log-likelihood per byte after the query, best first."""
    texts = body.documents_as_texts
    scores = served.pack.score(body.query, texts, cancel=call.cancel, **body.options())
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
        "usage": _usage(served, [body.query, *texts], call),
    }


def decide(served: Served, body: Decide, call: Call) -> Events:
    """Pack.decide."""
    if (body.prompt is None) == (body.messages is None):
        raise PromptError("give either prompt or messages")
    prompt: Prompt = body.messages or body.prompt or ""
    result = served.pack.decide(prompt, body.choices, calibrated=body.calibrated, cancel=call.cancel, **body.options())
    call.read(served.pack.count_tokens(prompt), result.weights)
    yield {"id": new_id("decision-"), "object": "decision", "model": served.name, **result.as_dict()}


def _usage(served: Served, texts: list[str], call: Call) -> dict[str, int]:
    count = sum(len(served.pack.tokenize(text)) for text in texts)
    call.read(count)
    return {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
