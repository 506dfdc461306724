"""What a request gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from packllm.explanation import Explanation
from packllm.weights.result import Weights

FinishReason = Literal["stop", "length"]


@dataclass
class Asking:
    """One request to a server: what it said of its tokens, and the pieces of text that came so far."""

    usage: Any = None
    pieces: int = 0

    def told(self, name: str) -> int | None:
        """The server's own count."""
        count = self.usage.get(name) if isinstance(self.usage, Mapping) else None
        return count if isinstance(count, int) else None


class Bill:
    """What one server was asked for in one request. Safe to use from several threads."""

    def __init__(self) -> None:
        self._all: list[Asking] = []

    def add(self, usage: Any = None) -> Asking:
        """One more request, of which the server may say its usage now or later."""
        self._all.append(Asking(usage))
        return self._all[-1]

    @property
    def prompt_tokens(self) -> int:
        """Of the first prompt whose count the server told; 0 before."""
        return next((count for one in self._all if (count := one.told("prompt_tokens"))), 0)

    def as_dict(self) -> dict[str, int]:
        """Requests, and prompt and completion tokens of all of them, as the server counts them. Of requests that were
        dropped before it did (unreported), the pieces of text that had come are counted, and no prompt."""
        read = [one.told("prompt_tokens") for one in self._all]
        written = [one.told("completion_tokens") for one in self._all]
        return {
            "requests": len(self._all),
            "prompt_tokens": sum(filter(None, read)),
            "completion_tokens": sum(
                one.pieces if count is None else count for one, count in zip(self._all, written, strict=True)
            ),
            "unreported": read.count(None),
        }


@dataclass(frozen=True)
class Usage:
    """Token counts of one request, in the tokenizer of its top-weighted member.

    Attributes:
        cached_tokens: of the prompt, those that an earlier request had read. Two usages that differ here only are
            equal: it says what was saved, not what was asked.
        drafted_tokens: those that the top member drafted and the pack judged; not compared either.
        accepted_tokens: of these, those that it took over.
        servers: by name of each member on a server, what it was asked for (see Bill); not compared.
        rounds: where members on servers decode token by token: times that these were asked for next tokens.
        proved_at_once: tokens (the end among them) that the first time proved to be the likeliest.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = field(default=0, compare=False)
    drafted_tokens: int = field(default=0, compare=False)
    accepted_tokens: int = field(default=0, compare=False)
    servers: Mapping[str, Mapping[str, int]] = field(default_factory=dict, compare=False)
    rounds: int = field(default=0, compare=False)
    proved_at_once: int = field(default=0, compare=False)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "total_tokens": self.total_tokens,
        }
        if self.servers:
            counts["servers"] = dict(self.servers)
        if self.rounds:
            counts |= {"rounds": self.rounds, "proved_at_once": self.proved_at_once}
        return counts


_RULED_OUT = -9999.0
"""What -infinity is in JSON, as OpenAI has it."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was where it was chosen. The bytes of all tokens of an answer are its text with the
    reasoning, the calls and the stop string that ended it; the token that ends an answer is not among them.

    Attributes:
        token: what it spells; part of a character is shown as U+FFFD. In Cool-Fusion, the text of a whole segment.
        bytes: what it adds to the text, in UTF-8; none for a control token.
        id: in the vocabulary of the first member that runs; None for a segment.
        logprob: in nats, in the distribution that tokens are chosen from: the fused one, after penalties, logit_bias
            and the form that json_schema or tool_choice demands, before temperature, top_k, top_p and min_p. Of a
            segment: its fused log-likelihood.
        members: {name: log-probability} of each member that ran, in its own distribution as it is. A segment: of each
            member that could judge it.
        top_logprobs: the likeliest tokens there, so many as asked for, the likeliest first; the chosen one may be
            missing. Of a segment: what else was proposed.
    """

    token: str
    bytes: tuple[int, ...]
    id: int | None
    logprob: float
    members: dict[str, float]
    top_logprobs: tuple[TokenLogprob, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe; all that OpenAI says of a token, and the rest. -infinity is -9999."""
        return {
            "token": self.token,
            "logprob": max(self.logprob, _RULED_OUT),
            "bytes": list(self.bytes),
            "id": self.id,
            "members": {name: max(value, _RULED_OUT) for name, value in self.members.items()},
            "top_logprobs": [other.as_dict() for other in self.top_logprobs],
        }


def logprobs_of(chunks: Sequence[Chunk]) -> tuple[TokenLogprob, ...] | None:
    """All that chunks say of their tokens; None if nobody asked."""
    told = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return tuple(token for tokens in told for token in tokens) if told else None


@dataclass(frozen=True)
class Chunk:
    """A piece of streamed text. `text` may be empty in the last chunk.

    `reasoning` is a piece of what the members reason before they answer, which is no part of the text. `weights` is on
    every chunk: where they move, the first one has those that the answer started from, and the last one what became of
    them. `finish_reason`, `usage`, `timings` and `decoding`, how it was written, are on the last one only. `logprobs`,
    where the option asks for them, are of the tokens since the last chunk. On the last one there are
    `explanation`, where it is asked for, and `end`, of the token that ended the answer, where one did.
    """

    text: str
    weights: Weights
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: dict[str, float] | None = None
    reasoning: str = ""
    decoding: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    explanation: Explanation | None = None
    end: TokenLogprob | None = None


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
        logprobs: of each token, where the option asks for them.
        decoding: how it was written, such as "tokens" or "cool"; what decoding="auto" chose.
        explanation: where the option explain asks for it.
    """

    text: str
    weights: Weights
    finish_reason: FinishReason
    usage: Usage
    timings: dict[str, float] = field(default_factory=dict)
    reasoning: str = ""
    decoding: str = "tokens"
    logprobs: tuple[TokenLogprob, ...] | None = None
    explanation: Explanation | None = None

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk]) -> Generation:
        """The generation that the chunks of a stream make, all of them and in order."""
        last = chunks[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        text, reasoning = "".join(c.text for c in chunks), "".join(c.reasoning for c in chunks)
        return cls(
            text,
            last.weights,
            last.finish_reason,
            last.usage,
            last.timings or {},
            reasoning,
            last.decoding or "tokens",
            logprobs_of(chunks),
            last.explanation,
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON-safe values."""
        return {
            "text": self.text,
            "weights": self.weights.as_dict(),
            "finish_reason": self.finish_reason,
            "usage": self.usage.as_dict(),
            "timings": self.timings,
            "reasoning": self.reasoning,
            "logprobs": None if self.logprobs is None else [token.as_dict() for token in self.logprobs],
            "decoding": self.decoding,
            "explanation": None if self.explanation is None else self.explanation.as_dict(),
        }
