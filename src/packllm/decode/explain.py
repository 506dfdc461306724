"""Explanations of a request: the parts of its prompt, and each member's share of the answer's tokens."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import replace

from packllm.carried import CarriedToken, Part, part, places, shares
from packllm.chat.formatted import Formatted
from packllm.chat.messages import Prompt
from packllm.decode.request import Request
from packllm.explanation import Explanation
from packllm.results import Chunk, TokenLogprob
from packllm.weights.result import Weights


def explanation(request: Request, row: int) -> Explanation:
    """Explain a prompt that is prefilled and has weights; needs the option `explain`."""
    weights, (live, common) = request.weights[row], request.evidence[row]
    text = next(iter(request.encoded[row].values())).text
    unit = weights.unit if common.tokens is None or weights.unit == "byte" else "token"
    if common.tokens is None and unit == "token":
        unit = "word"
    units = _bytes(text, common.spans) if unit == "byte" else [1] * len(common.spans)
    names, matrix = [request.members[k].name for k in live], common.matrix.tolist()

    def part_of(start: int, end: int) -> Part:
        inside = [at for at, span in enumerate(common.spans) if _is_inside(text, span, start, end)]
        columns = {name: [logprobs[at] for at in inside] for name, logprobs in zip(names, matrix, strict=True)}
        return part(text[start:end], _by_name(weights), columns, [units[at] for at in inside])

    return Explanation(
        weights.names,
        weights.values,
        unit,
        tuple(part_of(*span) for span in _messages(request.prompts[row], text)),
        tuple(part_of(*span) for span in places(text, request.options.passages)),
    )


def explained(request: Request, pieces: Iterator[tuple[int, Chunk]]) -> Iterator[tuple[int, Chunk]]:
    """Add an explanation to the last chunk of each row."""
    tokens: dict[int, list[CarriedToken]] = {}
    decoders: dict[int, codecs.IncrementalDecoder] = {}
    for r, chunk in pieces:
        decoder = decoders.setdefault(r, codecs.getincrementaldecoder("utf-8")(errors="replace"))
        so_far = tokens.setdefault(r, [])
        so_far += [_carried(token, chunk.weights, decoder) for token in chunk.logprobs or ()]
        if chunk.finish_reason is not None:
            if so_far and (cut_off := decoder.decode(b"", final=True)):
                so_far[-1] = replace(so_far[-1], text=so_far[-1].text + cut_off)
            chunk = replace(chunk, explanation=replace(explanation(request, r), tokens=tuple(so_far)))
        yield r, chunk if request.options.tells_logprobs else replace(chunk, logprobs=None)


def _carried(token: TokenLogprob, weights: Weights, decoder: codecs.IncrementalDecoder) -> CarriedToken:
    by_name = _by_name(weights)
    return CarriedToken(decoder.decode(bytes(token.bytes)), token.logprob, shares(by_name, token.members), by_name)


def _by_name(weights: Weights) -> dict[str, float]:
    return dict(zip(weights.names, weights.values, strict=True))


def _messages(prompt: Prompt, text: str) -> Iterator[tuple[int, int]]:
    """Spans of the user's messages in the scored text; one span of all of it if only a part is scored."""
    if isinstance(prompt, Formatted):
        contents = list(prompt.words.values())
    elif isinstance(prompt, str):
        contents = [prompt]
    else:
        contents = [message.get("content") or "" for message in prompt if message["role"] == "user"]
    if "".join(contents) != text:
        contents = [text]
    at = 0
    for content in contents:
        yield at, at + len(content)
        at += len(content)


def _is_inside(text: str, span: tuple[int, int], start: int, end: int) -> bool:
    """Whether a token lies inside a part; a space before its word may lie before the part."""
    first, last = span
    word = last - len(text[first:last].lstrip())
    return start <= word and start < last <= end


def _bytes(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Bytes of each span; the bytes of a character that several spans share count once."""
    counts, last_end = [], 0
    for start, end in spans:
        counts.append(len(text[max(start, last_end) : end].encode()))
        last_end = max(last_end, end)
    return counts
