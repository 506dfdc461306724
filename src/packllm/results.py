"""The results of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from packllm.explanation import Explanation
from packllm.weights.result import Weights

FinishReason = Literal["stop", "length"]


@dataclass
class Asking:
    """One request to a server: the usage that it reported, and the number of text pieces so far."""

    usage: Any = None
    pieces: int = 0

    def reported(self, name: str) -> int | None:
        """The server's count of that name; None if it gave none."""
        count = self.usage.get(name) if isinstance(self.usage, Mapping) else None
        return count if isinstance(count, int) else None


class Bill:
    """The requests to one server that one request of the pack made. Safe to use from several threads."""

    def __init__(self) -> None:
        self._all: list[Asking] = []

    def add(self, usage: Any = None) -> Asking:
        """Record a request; the server may report its usage now or later."""
        self._all.append(Asking(usage))
        return self._all[-1]

    @property
    def prompt_tokens(self) -> int:
        """The first count of prompt tokens that the server reported; 0 before."""
        return next((count for one in self._all if (count := one.reported("prompt_tokens"))), 0)

    def as_dict(self) -> dict[str, int]:
        """Number of requests, and their prompt and completion tokens as the server counts them. For requests that were
        cancelled before it did (`unreported`), completion tokens are the pieces of text received, prompt tokens 0."""
        prompt_counts = [one.reported("prompt_tokens") for one in self._all]
        completion_counts = [one.reported("completion_tokens") for one in self._all]
        return {
            "requests": len(self._all),
            "prompt_tokens": sum(filter(None, prompt_counts)),
            "completion_tokens": sum(
                one.pieces if count is None else count for one, count in zip(self._all, completion_counts, strict=True)
            ),
            "unreported": prompt_counts.count(None),
        }


@dataclass(frozen=True)
class Usage:
    """Token counts of one request, in the tokenizer of the member with the largest weight.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens of the answer, without the end token.
        cached_tokens: prompt tokens that an earlier request had read. This and the fields below are not compared: two
            usages that differ only in them are equal.
        reasoning_tokens: how many of the answer's tokens came until the end of its reasoning, with the marks around it;
            all others are text. In Cool-Fusion, tokens of the segments' authors, as completion_tokens.
        drafted_tokens: draft tokens that were proposed.
        accepted_tokens: draft tokens that were accepted.
        servers: by name of each member on a server, the counts of its requests (see Bill).
        rounds: in token-by-token decoding with members on servers: how often these were asked for next tokens.
        proved_at_once: how many tokens (the end included) were proved to be the most likely by the first round.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = field(default=0, compare=False)
    reasoning_tokens: int = field(default=0, compare=False)
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
            "reasoning_tokens": self.reasoning_tokens,
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
"""Stands for -infinity in JSON, as in OpenAI's API."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probabilities of one token of an answer. Joined, the `bytes` of an answer's tokens are its text,
    including reasoning, tool calls and the stop string that ended it. The end token is not included.

    Attributes:
        token: its spelling; a part of a character is shown as U+FFFD. In Cool-Fusion, the text of a whole segment.
        bytes: the bytes that it adds to the text, in UTF-8; empty for a control token.
        id: its id in the vocabulary of the first running member; None for a segment.
        logprob: in nats, in the distribution that tokens are chosen from: the fused one after penalties, logit_bias and
            grammar, before temperature, top_k, top_p and min_p. For a segment: its fused log-likelihood.
        members: {name: log-probability} of each member that ran, in its own unchanged distribution. For a segment: of
            each member that could judge it.
        top_logprobs: the requested number of most likely tokens, most likely first; the chosen one may be missing. For
            a segment: the proposals.
    """

    token: str
    bytes: tuple[int, ...]
    id: int | None
    logprob: float
    members: dict[str, float]
    top_logprobs: tuple[TokenLogprob, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe: OpenAI's fields, then the others. -infinity is -9999."""
        return {
            "token": self.token,
            "logprob": max(self.logprob, _RULED_OUT),
            "bytes": list(self.bytes),
            "id": self.id,
            "members": {name: max(value, _RULED_OUT) for name, value in self.members.items()},
            "top_logprobs": [other.as_dict() for other in self.top_logprobs],
        }


def logprobs_of(chunks: Sequence[Chunk]) -> tuple[TokenLogprob, ...] | None:
    """The log-probabilities in chunks, joined; None if they were not requested."""
    groups = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return tuple(token for tokens in groups for token in tokens) if groups else None


@dataclass(frozen=True)
class Chunk:
    """A piece of streamed text. `text` may be empty in the last chunk.

    Attributes:
        text: a piece of the answer.
        weights: the members' weights. With adaptive weights, the first chunk has those from before the answer, and the
            last chunk the final ones.
        finish_reason, usage, timings, decoding: only on the last chunk; see Generation.
        reasoning: a piece of the reasoning before the answer; no part of the text.
        logprobs: of the tokens since the last chunk, if requested.
        explanation: only on the last chunk, if requested.
        end: only on the last chunk: log-probabilities of the end token, if requested and if there was one.
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
        text: the answer, without the prompt and without a stop string.
        weights: the members' weights, and the NLLs that they are computed from.
        finish_reason: "stop" (end token or stop string) or "length" (max_tokens).
        usage: token counts.
        timings: seconds of prefill, weighting, first_token and total.
        reasoning: the reasoning before the answer of a conversation, between marks such as <think> and </think>; no
            part of the text.
        decoding: the decoding that was used, such as "tokens" or "cool", also if the option was "auto".
        logprobs: of each token, if requested.
        explanation: if requested.
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
        """Join all chunks of a stream, in order."""
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
        """Everything as JSON-safe values."""
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
