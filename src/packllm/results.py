"""What a request gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from packllm.weights.result import Weights

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Usage:
    """Token counts of one request, in the tokenizer of its top-weighted member.

    Attributes:
        cached_tokens: of the prompt, those that an earlier request had read. Two usages that differ here only are
            equal: it says what was saved, not what was asked.
        drafted_tokens: those that the top member drafted and the pack judged; not compared either.
        accepted_tokens: of these, those that it took over.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = field(default=0, compare=False)
    drafted_tokens: int = field(default=0, compare=False)
    accepted_tokens: int = field(default=0, compare=False)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "total_tokens": self.total_tokens,
        }


@dataclass(frozen=True)
class Chunk:
    """A piece of streamed text. `text` may be empty in the last chunk.

    `reasoning` is a piece of what the members reason before they answer, which is no part of the text. `weights` is on
    every chunk; `finish_reason`, `usage` and `timings` are on the last one only.
    """

    text: str
    weights: Weights
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: dict[str, float] | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    Attributes:
        text: the completion alone, never the prompt, never a stop string.
        weights: what each member counted for, and why.
        finish_reason: "stop" (end-of-turn token or stop string) or "length" (max_tokens).
        usage: token counts.
        timings: seconds: prefill, weighting, first_token, total.
        reasoning: what was reasoned before the answer of a conversation, between marks such as <think> and </think>;
            no part of the text.
    """

    text: str
    weights: Weights
    finish_reason: FinishReason
    usage: Usage
    timings: dict[str, float] = field(default_factory=dict)
    reasoning: str = ""

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk]) -> Generation:
        """The generation that the chunks of a stream make, all of them and in order."""
        last = chunks[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        text, reasoning = "".join(c.text for c in chunks), "".join(c.reasoning for c in chunks)
        return cls(text, last.weights, last.finish_reason, last.usage, last.timings or {}, reasoning)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON-safe values."""
        return {
            "text": self.text,
            "weights": self.weights.as_dict(),
            "finish_reason": self.finish_reason,
            "usage": self.usage.as_dict(),
            "timings": self.timings,
            "reasoning": self.reasoning,
        }
