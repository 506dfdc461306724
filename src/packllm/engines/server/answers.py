"""Parse servers' answers: tokens, their log-probabilities, and their positions in a text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from packllm.engines.server.http import ServerError, TransientError

Token = tuple[str | None, float | None]
"""Text and log-probability of a token of a prompt; None for what the server does not report."""

Placed = tuple[int, int, int]
"""A token's index in an answer, and its start and end character in a text."""


@dataclass(frozen=True)
class TextLogprobs:
    """Log-probabilities of a text under a model.

    Attributes:
        starts, ends: character offsets of the tokens.
        logprobs: of the tokens.
        end: log-probability that the answer ends after the text.
    """

    starts: list[int]
    ends: list[int]
    logprobs: list[float]
    end: float


class UnusableAnswer(ServerError):
    """A server's answer does not have the log-probabilities that were requested."""


def first_choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise TransientError("the server's answer has no choices")
    return choices[0]


def prompt_tokens(answer: Any, choice: Mapping[str, Any], count: Any) -> list[Token]:
    """The tokens of the prompt.

    Args:
        count: number of prompt tokens, if known. Without it, in the form of `echo`, the last token is the answer's.

    Raises:
        UnusableAnswer: the answer has no log-probabilities of the prompt, has them in an unknown form, or has the
            wrong number of them.
    """
    listed = answer.get("prompt_logprobs") or choice.get("prompt_logprobs")
    tokens: list[Token] = []
    try:
        if listed:
            for entry in listed:
                one = next(iter(entry.values())) if entry else {}
                tokens.append((one.get("decoded_token"), _number(one.get("logprob"))))
            complete = True
        else:
            record = choice.get("logprobs") or {}
            texts, logprobs = record.get("tokens"), record.get("token_logprobs")
            if record.get("content"):
                raise UnusableAnswer("the server returns those of the answer only")
            if not texts or not logprobs or len(texts) != len(logprobs):
                raise UnusableAnswer("the server returns none")
            tokens = [(_text(text), _number(logprob)) for text, logprob in zip(texts, logprobs, strict=True)]
            complete = False
    except (AttributeError, TypeError, ValueError, KeyError):
        raise UnusableAnswer("the server returns them in an unknown form") from None
    if isinstance(count, int) and count > 0:
        if complete and len(tokens) not in (count, count + 1):
            raise UnusableAnswer(f"the server returns {len(tokens)} for {count} tokens")
        if not complete and len(tokens) < count:
            raise UnusableAnswer(
                "the server returns those of the answer only"
                if len(tokens) <= 1
                else f"the server returns {len(tokens)} for {count} tokens"
            )
        return tokens[:count]
    return tokens if complete else tokens[:-1]


def _text(token: Any) -> str | None:
    return token if isinstance(token, str) and not token.startswith("bytes:") else "�" if token else None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def generated(choice: Mapping[str, Any]) -> tuple[str, float] | None:
    """The last generated token and its log-probability; None if the server does not report them."""
    record = choice.get("logprobs") or {}
    try:
        if record.get("content"):
            return str(record["content"][-1]["token"]), float(record["content"][-1]["logprob"])
        if record.get("token_logprobs"):
            return str(record["tokens"][-1]), float(record["token_logprobs"][-1])
    except (AttributeError, TypeError, ValueError, KeyError):
        pass
    return None


def tops(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The most likely tokens at the position of the last generated one, with their log-probabilities."""
    record = choice.get("logprobs") or {}
    try:
        if record.get("content"):
            return [(str(one["token"]), float(one["logprob"])) for one in record["content"][-1]["top_logprobs"]]
        if record.get("top_logprobs"):
            return [(str(token), float(p)) for token, p in record["top_logprobs"][-1].items()]
    except (AttributeError, TypeError, ValueError, KeyError):
        pass
    return []


def end(choice: Mapping[str, Any]) -> float:
    """The log-probability that the answer ends here. If the model generated a token instead, this is an upper bound:
    the end is neither likelier than that token nor than the probability that the token leaves."""
    drawn = generated(choice)
    logprob = math.log(0.5) if drawn is None else min(drawn[1], 0.0)
    text = choice.get("text") or (choice.get("message") or {}).get("content") or ""
    if choice.get("finish_reason") == "stop" and not (text and choice.get("message")):
        return logprob
    return min(logprob, math.log(max(-math.expm1(logprob), 1e-6)))


def within(tokens: Sequence[Token], text: str) -> list[Placed] | None:
    """Where the tokens of a prompt lie in its text; None if they spell another text. A special token or a space that a
    server puts before the text is not counted."""
    for first in (0, 1):
        for lead in ("", " "):
            spans = aligned([token for token, _ in tokens[first:]], lead + text)
            if spans is not None:
                size = len(lead)
                return [(i, max(a - size, 0), max(b - size, 0)) for i, (a, b) in enumerate(spans, first)]
    return None


def located(tokens: Sequence[Token], text: str, at: int, to_end: bool = False) -> tuple[list[Placed], int] | None:
    """Where a part of a prompt lies among the prompt's tokens.

    Args:
        at: character of the prompt at which the search starts.
        to_end: whether the part must end with the prompt.

    Returns:
        The tokens' spans in the part, and the part's end in the prompt; None if the prompt does not contain it.
    """
    cuts = [0, *accumulate(len(token or "") for token, _ in tokens)]
    joined = "".join(token or "" for token, _ in tokens)
    spelled = "".join(c if c.isascii() else "\0" for c in text)  # servers may report other characters byte by byte
    pattern = re.escape(spelled).replace("\\\0", "\0")
    pattern = re.sub("\0+", lambda run: f"[^\\x00-\\x7f]{{{len(run[0])},{4 * len(run[0])}}}", pattern)
    match = re.compile(pattern + (r"\Z" if to_end else "")).search(joined, at)
    if match is None:
        return None
    start, stop = match.span()
    inside = [i for i in range(len(tokens)) if cuts[i + 1] > start and cuts[i] < stop]
    pieces = [joined[max(cuts[i], start) : min(cuts[i + 1], stop)] for i in inside]
    spans = aligned(pieces, text)
    if spans is None:
        return None
    placed = [
        (i, low - max(start - cuts[i], 0), high + max(cuts[i + 1] - stop, 0))
        for i, (low, high) in zip(inside, spans, strict=True)
    ]
    return placed, stop


def aligned(tokens: Sequence[str | None], text: str) -> list[tuple[int, int]] | None:
    """Where the tokens of a text lie in it; None if they spell another text. Tokens that are only some bytes of a
    character share the span of the characters that they spell together."""
    wild = [token is None or "�" in token for token in tokens]
    parts = []
    for token, unknown in zip(tokens, wild, strict=True):
        if not unknown:
            parts.append(re.escape(token or ""))
        elif token is None:
            parts.append("(.*?)")
        else:
            parts.append("(" + ".*?".join(map(re.escape, re.split("�+", token))) + ")")
    match = re.fullmatch("".join(parts), text, re.DOTALL)
    if match is None:
        return None
    groups = iter(match.groups())
    spans, at = [], 0
    for token, unknown in zip(tokens, wild, strict=True):
        size = len(next(groups)) if unknown else len(token or "")
        spans.append((at, at + size))
        at += size
    shared = [unknown or low == high for unknown, (low, high) in zip(wild, spans, strict=True)]
    first = 1 if tokens and tokens[0] is None else 0  # a token before the text, or its first token
    start = first
    while start < len(spans):
        stop = start
        while stop < len(spans) and shared[stop]:
            stop += 1
        if stop > start:
            last = stop if stop < len(spans) and spans[stop - 1][0] == spans[stop - 1][1] else stop - 1
            spans[start : last + 1] = [(spans[start][0], spans[last][1])] * (last + 1 - start)
            stop = last + 1
        start = stop + 1 if stop == start else stop
    return spans
