"""POST /v1/completions: continuations of texts, without a chat template."""

from __future__ import annotations

import codecs
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from packllm.chat.formatted import Tokens
from packllm.chat.messages import Prompt
from packllm.errors import ContextOverflowError
from packllm.results import Chunk, TokenLogprob
from packllm.serve.answers import Told, answers, new_id, usage_of
from packllm.serve.metrics import Call
from packllm.serve.models import Served
from packllm.serve.protocol import Completion
from packllm.serve.reading import Reading, as_vllm, readings
from packllm.serve.reply import Events


class Text:
    """One completion while it is generated.

    Args:
        body: the request.
        before: the prompt, if it is echoed; else "".
        reading: the prompt's tokens and log-probabilities, if they are needed.
    """

    def __init__(self, body: Completion, before: str, reading: Reading | None) -> None:
        self._body, self._reading = body, reading
        self.told = Told()
        self._offset = len(before)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._pending = before
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._first = reading if body.echo else None

    def feed(self, chunk: Chunk) -> tuple[str, dict[str, Any] | None]:
        """A chunk's text and its log-probabilities."""
        text, self._pending = self._pending + chunk.text, ""
        self._pieces.append(text)
        if self._body.logprobs is None:
            return text, None
        tokens = [*(chunk.logprobs or ()), *([chunk.end] if chunk.end else ())]
        logprobs = self._listed(tokens)
        self._logprobs.append(logprobs)
        return text, logprobs

    def _listed(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """OpenAI's four lists for some tokens; the first call puts an echoed prompt's tokens before them."""
        spelled, top = self._body.spelled, self._body.logprobs or 0
        names: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        reading, self._first = self._first, None
        if reading is not None:
            for text, i, one, at in zip(reading.texts, reading.ids, reading.told, reading.offsets, strict=True):
                names.append(spelled(text, i))
                logprobs.append(None if one is None else one.as_dict()["logprob"])
                tops.append(None if one is None else _tops(one, top, spelled))
                offsets.append(at)
        for token in tokens:
            names.append(spelled(token.token, token.id))
            logprobs.append(token.as_dict()["logprob"])
            tops.append(_tops(token, None, spelled))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(bytes(token.bytes)))
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def as_dict(self, index: int, reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._logprobs:
            logprobs = {name: [one for each in self._logprobs for one in each[name]] for name in self._logprobs[0]}
        choice = {"index": index, "text": "".join(self._pieces), "logprobs": logprobs, "finish_reason": reason}
        if self._body.prompt_logprobs is not None and self._reading is not None:
            choice["prompt_logprobs"] = as_vllm(self._reading, self._body.prompt_logprobs)
        return choice


def completion(served: Served, body: Completion, call: Call) -> Events:
    """The events of the answers: a single one with all complete answers, or those of a stream."""
    pack, n = served.pack, body.n or 1
    options = {**body.options(), "chat_template": False}
    prompts = [_prompt(served, prompt) for prompt in body.prompts]
    head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(time.time()), "model": served.name}
    head["system_fingerprint"] = served.fingerprint
    read: Sequence[Reading | None] = [None] * len(prompts)
    if body.prompt_logprobs is not None or body.max_tokens == 0 or (body.echo and body.logprobs is not None):
        read = readings(pack, prompts, options, max(body.prompt_logprobs or 0, body.logprobs or 0), call.cancel)
    before = [str(prompt) if body.echo else "" for prompt in prompts]
    texts = [Text(body, before[at], read[at]) for at in range(len(prompts)) for _ in range(n)]
    whole: list[dict[str, Any]] = [{} for _ in texts]
    pairs = (
        answers(pack, prompts, options, None if n == 1 else n, call) if body.max_tokens != 0 else _none(read, n, call)
    )
    with closing(pairs) as chunks:
        for index, chunk in chunks:
            text, logprobs = texts[index].feed(chunk)
            extra, reason = texts[index].told.feed(chunk), chunk.finish_reason
            if reason is not None:
                whole[index] = texts[index].as_dict(index, reason) | {"packllm": extra}
            if body.stream:
                choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
                event = {**head, "choices": [choice]} | ({"usage": None} if body.usage_at_end else {})
                yield event | {"packllm": extra} if extra else event
    usage = usage_of((text.told.usage for text in texts), n)
    if not body.stream:
        yield {**head, "choices": whole, "usage": usage, "packllm": whole[0]["packllm"]}
    elif body.usage_at_end:
        yield {**head, "choices": [], "usage": usage}


def _none(readings: Sequence[Reading | None], n: int, call: Call) -> Generator[tuple[int, Chunk], None, None]:
    """Answers without tokens, for prompts that are only scored."""
    for at, reading in enumerate(readings):
        assert reading is not None
        call.read(reading.usage.prompt_tokens)
        for i in range(n):
            yield at * n + i, Chunk("", reading.weights, "length", reading.usage, {})


def _prompt(served: Served, prompt: str | list[int]) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    window = served.pack.context_window
    if window is not None and len(prompt) > window:  # before the ids become text
        raise ContextOverflowError(served.name, window, len(prompt), 1)
    return Tokens.of(prompt, served.pack.members[0].vocabulary)


def _tops(token: TokenLogprob, count: int | None, spelled: Any) -> dict[str, float]:
    """Log-probabilities of the most likely tokens and the chosen one, by their text. If several tokens have the same
    text (parts of a character), the most likely one counts."""
    logprobs: dict[str, float] = {}
    for one in [*token.top_logprobs[:count], token]:
        logprobs.setdefault(spelled(one.token, one.id), one.as_dict()["logprob"])
    return logprobs
