"""Code that the text endpoints share: streaming answers, and the data that is sent beside their text."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any

from packllm.chat.messages import Prompt
from packllm.pack import Pack
from packllm.results import Chunk, TokenLogprob, Usage
from packllm.serve.metrics import Call
from packllm.weights import Weights


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


class Told:
    """Data about one answer beside its text, collected while it is generated.

    Attributes:
        start: the first chunk's weights.
        usage: set when the answer is complete.
    """

    def __init__(self) -> None:
        self.start: Weights | None = None
        self._now: Weights | None = None
        self.usage: Usage | None = None

    def feed(self, chunk: Chunk) -> dict[str, Any] | None:
        """New data in a chunk: the weights at the start and after each change, and everything at the end."""
        moved = chunk.weights is not self._now and chunk.weights != self._now
        self._now = chunk.weights
        if self.start is None:
            self.start = chunk.weights
        if chunk.finish_reason is not None:
            self.usage = chunk.usage
            weights = {"start": self.start.as_dict(), "end": chunk.weights.as_dict()}
            explanation = {} if chunk.explanation is None else {"explanation": chunk.explanation.as_dict()}
            return {"weights": weights, "timings": chunk.timings, **explanation}
        if not moved:
            return None
        name = "start" if chunk.weights is self.start else "now"
        return {"weights": {name: chunk.weights.as_dict()}}


def answers(
    pack: Pack, prompts: Sequence[Prompt], options: dict[str, Any], n: int | None, call: Call
) -> Generator[tuple[int, Chunk], None, None]:
    """Pack.stream_batch, with metrics."""
    count: dict[str, Any] = {} if n is None else {"n": n}
    first: dict[int, float] = {}
    with closing(pack.stream_batch(prompts, cancel=call.cancel, **options, **count)) as chunks:
        for index, chunk in chunks:
            if index not in first:
                first[index] = call.first()
            if chunk.finish_reason is not None:
                call.answered(chunk, first[index], new_prompt=index % (n or 1) == 0)
            yield index, chunk


def usage_of(usages: Iterable[Usage | None], n: int = 1) -> dict[str, Any]:
    """OpenAI's usage of several answers, n for each prompt. A prompt counts once."""
    known = [usage for usage in usages if usage is not None]
    prompt = sum(usage.prompt_tokens for usage in known[::n])
    cached = sum(usage.cached_tokens for usage in known[::n])
    completion = sum(usage.completion_tokens for usage in known)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "reasoning_tokens": sum(usage.reasoning_tokens for usage in known),
            "accepted_prediction_tokens": sum(usage.accepted_tokens for usage in known),
            "rejected_prediction_tokens": sum(usage.drafted_tokens - usage.accepted_tokens for usage in known),
        },
    }


def chat_logprobs(
    tokens: Sequence[TokenLogprob] | None, spelled: Callable[[str, int | None], str]
) -> dict[str, Any] | None:
    """Log-probabilities in the format of /v1/chat/completions; `spelled` names a token, given its text and id."""
    if tokens is None:
        return None
    content = [token.as_dict() for token in tokens]
    for one in content:
        for each in (one, *one["top_logprobs"]):
            each["token"] = spelled(each["token"], each["id"])
    return {"content": content, "refusal": None}
