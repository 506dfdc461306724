"""What servers answer, in whichever of their forms: tokens, their log-probabilities, and where they are in a text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from packllm.engines.server.http import Again, ServerError

Token = tuple[str | None, float | None]
"""The text of a token of a prompt and its log-probability, as far as they are told."""

Placed = tuple[int, int, int]
"""Which token of a reading it is, and its span in a text."""


@dataclass(frozen=True)
class Given:
    """What a model gives a text: character offsets of its tokens, the log-probability of each, and that of the
    answer's end after it."""

    starts: list[int]
    ends: list[int]
    logprobs: list[float]
    end: float


class Wrong(ServerError):
    """Why what a server said is not what was asked for."""


def first_choice(answer: Any) -> Mapping[str, Any]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise Again("an answer without choices")
    return choices[0]


def prompt_tokens(answer: Any, choice: Mapping[str, Any], count: Any) -> list[Token]:
    """The tokens of the prompt, `count` if that is known."""
    listed = answer.get("prompt_logprobs") or choice.get("prompt_logprobs")
    tokens: list[Token] = []
    try:
        if listed:
            for entry in listed:
                one = next(iter(entry.values())) if entry else {}
                tokens.append((one.get("decoded_token"), _number(one.get("logprob"))))
            whole = True
        else:
            told = choice.get("logprobs") or {}
            texts, given = told.get("tokens"), told.get("token_logprobs")
            if told.get("content"):
                raise Wrong("they are of the answer only")
            if not texts or not given or len(texts) != len(given):
                raise Wrong("the server returns none")
            tokens = [(_text(text), _number(logprob)) for text, logprob in zip(texts, given, strict=True)]
            whole = False
    except (AttributeError, TypeError, ValueError, KeyError):
        raise Wrong("they come in a form that is not known") from None
    if isinstance(count, int) and count > 0:
        if whole and len(tokens) not in (count, count + 1):
            raise Wrong(f"there are {len(tokens)} for {count} tokens")
        if not whole and len(tokens) < count:
            raise Wrong("they are of the answer only" if len(tokens) <= 1 else f"{len(tokens)} for {count} tokens")
        return tokens[:count]
    return tokens if whole else tokens[:-1]


def _text(token: Any) -> str | None:
    return token if isinstance(token, str) and not token.startswith("bytes:") else "�" if token else None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def generated(choice: Mapping[str, Any]) -> tuple[str, float] | None:
    """The token that was drawn, with its log-probability."""
    told = choice.get("logprobs") or {}
    try:
        if told.get("content"):
            return str(told["content"][-1]["token"]), float(told["content"][-1]["logprob"])
        if told.get("token_logprobs"):
            return str(told["tokens"][-1]), float(told["token_logprobs"][-1])
    except (AttributeError, TypeError, ValueError, KeyError):
        pass
    return None


def tops(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The likeliest tokens in place of the one that was drawn, with their log-probabilities."""
    told = choice.get("logprobs") or {}
    try:
        if told.get("content"):
            return [(str(one["token"]), float(one["logprob"])) for one in told["content"][-1]["top_logprobs"]]
        if told.get("top_logprobs"):
            return [(str(token), float(p)) for token, p in told["top_logprobs"][-1].items()]
    except (AttributeError, TypeError, ValueError, KeyError):
        pass
    return []


def end(choice: Mapping[str, Any]) -> float:
    """The log-probability that the answer ends here. Where the model would go on, it is at most that of what it would
    rather write, and of all that is not this."""
    drawn = generated(choice)
    logprob = math.log(0.5) if drawn is None else min(drawn[1], 0.0)
    said = choice.get("text") or (choice.get("message") or {}).get("content") or ""
    if choice.get("finish_reason") == "stop" and not (said and choice.get("message")):
        return logprob
    return min(logprob, math.log(max(-math.expm1(logprob), 1e-6)))


def within(tokens: Sequence[Token], text: str) -> list[Placed] | None:
    """Where the tokens of a whole prompt are in its text; None where they spell another one. What a server puts before
    a text, a mark or a space, is not in it."""
    for first in (0, 1):
        for lead in ("", " "):
            spans = aligned([token for token, _ in tokens[first:]], lead + text)
            if spans is not None:
                size = len(lead)
                return [(i, max(a - size, 0), max(b - size, 0)) for i, (a, b) in enumerate(spans, first)]
    return None


def located(tokens: Sequence[Token], text: str, at: int, to_end: bool = False) -> tuple[list[Placed], int] | None:
    """Where the tokens of a part of a prompt are in that part: the first from character `at` of the prompt on, or the
    one at its end; and where in the prompt it ends. None: it is not there."""
    cuts = [0, *accumulate(len(token or "") for token, _ in tokens)]
    joined = "".join(token or "" for token, _ in tokens)
    spelled = "".join(c if c.isascii() else "\0" for c in text)  # others may be told byte by byte
    pattern = re.escape(spelled).replace("\\\0", "\0")
    pattern = re.sub("\0+", lambda run: f"[^\\x00-\\x7f]{{{len(run[0])},{4 * len(run[0])}}}", pattern)
    found = re.compile(pattern + (r"\Z" if to_end else "")).search(joined, at)
    if found is None:
        return None
    start, stop = found.span()
    inside = [i for i in range(len(tokens)) if cuts[i + 1] > start and cuts[i] < stop]
    told = [joined[max(cuts[i], start) : min(cuts[i + 1], stop)] for i in inside]
    spans = aligned(told, text)
    if spans is None:
        return None
    placed = [
        (i, low - max(start - cuts[i], 0), high + max(cuts[i + 1] - stop, 0))
        for i, (low, high) in zip(inside, spans, strict=True)
    ]
    return placed, stop


def aligned(tokens: Sequence[str | None], text: str) -> list[tuple[int, int]] | None:
    """Where the tokens of a text are in it; None where they spell another one. Tokens of a few bytes of a character,
    which no text can tell, share the span of what they spell together."""
    wild = [token is None or "�" in token for token in tokens]
    parts = []
    for token, unknown in zip(tokens, wild, strict=True):
        if not unknown:
            parts.append(re.escape(token or ""))
        elif token is None:
            parts.append("(.*?)")
        else:
            parts.append("(" + ".*?".join(map(re.escape, re.split("�+", token))) + ")")
    found = re.fullmatch("".join(parts), text, re.DOTALL)
    if found is None:
        return None
    groups = iter(found.groups())
    spans, at = [], 0
    for token, unknown in zip(tokens, wild, strict=True):
        size = len(next(groups)) if unknown else len(token or "")
        spans.append((at, at + size))
        at += size
    shared = [unknown or low == high for unknown, (low, high) in zip(wild, spans, strict=True)]
    first = 1 if tokens and tokens[0] is None else 0  # what comes before the text, or its first token
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
