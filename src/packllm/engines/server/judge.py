"""What a server says of the log-probabilities of a prompt, and whether that is right.

vLLM returns them as `prompt_logprobs`, others with `echo`. Some return those of the answer only, some shift them by one
token; so a server is tried when it is connected, on texts of which something is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from packllm.align.words import offsets
from packllm.chat.prompt import Encoded, Encoder
from packllm.engines.server.answers import (
    Given,
    Placed,
    Token,
    Wrong,
    end,
    first_choice,
    generated,
    located,
    prompt_tokens,
    tops,
    within,
)
from packllm.engines.server.http import ATTEMPTS, Endpoint, Gate, ServerError, together, unguarded
from packllm.results import Bill

FLUENT = (
    "The capital of France is Paris. Once upon a time there was a little girl who lived in a small house near the "
    "forest with her old dog.",
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris.",
)
SHUFFLED = (
    "with dog. forest lived The a is there a house in of was girl the upon small who near capital Once old France time "
    "a little Paris. her",
    "fox is lazy Paris. quick of The dog. the What jumps is France? capital brown the over The the of capital France",
)
BEGUN = ("The capital of France is", "Once upon a time there was a little", "The quick brown fox jumps over the")

_CLOSE = 0.2  # nats between a token's log-probability when it is drawn, and when it is read


@dataclass(frozen=True)
class Asked(Encoded):
    """A prompt as a server is asked it; it has ids where its tokenizer is known here.

    Attributes:
        messages: the conversation; None for a text that is continued.
        whole: that text.
        words: the contents that are scored, with the parts of each (start, stop).
        variables: of the chat template.
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    whole: str = ""
    words: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    def plain(self, answer: str = "") -> tuple[str, list[int]]:
        """The prompt and the beginning of its answer as one text, a conversation as one line a message; where in it
        the scored contents begin."""
        whole, begins = self.whole, list[int]()
        if self.messages is None:
            for content, _ in self.words:
                begins.append(whole.find(content, begins[-1] + 1 if begins else 0))
            return whole + answer, begins
        for message in self.messages:
            whole += f"{str(message['role']).capitalize()}: "
            if message["role"] == "user":
                begins.append(len(whole))
            whole += f"{message['content']}\n"
        return f"{whole}Assistant:{' ' if answer[:1].isalnum() else ''}{answer}", begins


@dataclass(frozen=True)
class Way:
    """How log-probabilities of a prompt are asked for."""

    name: str
    path: str
    fields: Mapping[str, Any]


_TEXT = {"max_tokens": 1, "temperature": 0, "logprobs": 1}
_CHAT = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 1}
TEXT_WAYS = (
    Way("prompt_logprobs", "/completions", {**_TEXT, "prompt_logprobs": 1}),
    Way("echo", "/completions", {**_TEXT, "echo": True}),
)
CHAT_WAY = Way("prompt_logprobs", "/chat/completions", {**_CHAT, "prompt_logprobs": 1})


class Judge:
    """What a server says of the log-probabilities of prompts.

    Args:
        model: as the server calls it.
        text: how they are asked for of a text; None: they are not.
        chat: and of a conversation. Without it a conversation is put as plain text.
        encoder: where the server's tokenizer is known here; prompts then go out as ids.
    """

    def __init__(
        self, endpoint: Endpoint, model: str, text: Way | None, chat: Way | None, encoder: Encoder | None = None
    ) -> None:
        self._endpoint, self._model, self.text, self.chat, self._encoder = endpoint, model, text, chat, encoder

    @classmethod
    def of(cls, endpoint: Endpoint, model: str, encoder: Encoder | None = None) -> tuple[Judge | None, str]:
        """A judge in the ways in which a server tells right log-probabilities, if there are any; what was found, in
        words."""
        found: dict[str, Way] = {}
        reasons = []
        for way in TEXT_WAYS:
            try:
                cls(endpoint, model, way, None)._check(chat=False)
                found["text"] = way
                break
            except ServerError as error:
                reasons.append(f"{way.name}: {error}")
        if "text" not in found or found["text"].name == CHAT_WAY.name:
            try:
                cls(endpoint, model, None, CHAT_WAY)._check(chat=True)
                found["chat"] = CHAT_WAY
            except ServerError as error:
                reasons.append(f"in conversations: {error}")
        if not found:
            return None, "no log-probabilities of prompts that can be used: " + "; ".join(reasons)
        told = ", ".join(f"{way.name} of {way.path}" for way in found.values())
        by_ids = encoder if "text" in found else None
        judge = cls(endpoint, model, found.get("text"), found.get("chat"), by_ids)
        return judge, f"its log-probabilities of prompts are right ({told})"

    # Reading

    def score(self, asked: Asked, bill: Bill, gate: Gate = unguarded, attempts: int = ATTEMPTS) -> Given | None:
        """What the model gives the scored text of a prompt; offsets are in that text. None: it cannot be told.

        Raises:
            ServerError: the server failed, or what it says is not what it said when it was tried.
        """
        way = self._way(asked)
        if way is None:
            return None
        prompt, begins = self._prompt(way, asked)
        tokens, ended = self._read(way, prompt, bill, gate, attempts)
        if isinstance(prompt, list):
            told = [tokens[at][1] for at in asked.positions]
            if None in told:
                raise Wrong("there are log-probabilities missing")
            return Given(list(asked.starts), list(asked.ends), [p for p in told if p is not None], ended)
        spans = within(tokens, prompt) if isinstance(prompt, str) else None
        given, base, at = Given([], [], [], ended), 0, 0
        for n, (text, parts) in enumerate(asked.words):
            if begins is None:  # in the server's own template
                found = located(tokens, text, at)
                if found is None:
                    return None
                placed, at = found
            elif spans is None:
                return None
            else:
                placed = [(i, low - begins[n], high - begins[n]) for i, low, high in spans]
            for start, stop in parts:
                for i, low, high in placed:
                    logprob = tokens[i][1]
                    if start <= low < high <= stop and logprob is not None:
                        given.starts.append(low - start + base)
                        given.ends.append(high - start + base)
                        given.logprobs.append(logprob)
                base += stop - start
        return given

    def judge(
        self, asked: Asked, before: str, texts: Sequence[str], bill: Bill, gate: Gate = unguarded
    ) -> list[Given | None]:
        """What the model gives each of several texts that come after a prompt and `before`; offsets are in that text.
        None: it cannot be told.

        Raises:
            ServerError: see score().
        """
        way = self._way(asked)
        if way is None:
            return [None] * len(texts)
        return together([partial(self._judged, way, asked, before, text, bill, gate) for text in texts])

    def _judged(self, way: Way, asked: Asked, before: str, text: str, bill: Bill, gate: Gate) -> Given | None:
        prompt, _ = self._prompt(way, asked, before, text)
        tokens, ended = self._read(way, prompt, bill, gate)
        placed: list[Placed] | None
        if isinstance(prompt, list):
            assert self._encoder is not None
            pieces = [self._encoder.vocabulary.text_bytes(i) for i in self._encoder.continuation(text)]
            spans = offsets(text, pieces)
            first = len(prompt) - len(pieces)
            cuts = spans or ([0] * len(pieces), [len(text)] * len(pieces))
            placed = [(first + i, low, high) for i, (low, high) in enumerate(zip(*cuts, strict=True))]
        elif isinstance(prompt, str):
            placed = within(tokens, prompt)
            if placed is not None:
                placed = [(i, low - len(prompt) + len(text), high - len(prompt) + len(text)) for i, low, high in placed]
        else:
            found = located(tokens, before + text, 0, to_end=True)
            placed = None if found is None else [(i, a - len(before), b - len(before)) for i, a, b in found[0]]
        if placed is None:
            return None
        inside = [(i, max(low, 0), high) for i, low, high in placed if high > 0 and tokens[i][1] is not None]
        starts, ends = [low for _, low, _ in inside], [high for _, _, high in inside]
        return Given(starts, ends, [tokens[i][1] or 0.0 for i, _, _ in inside], ended)

    def _way(self, asked: Asked) -> Way | None:
        if asked.messages is None or (asked.ids and self._encoder is not None):
            return self.text
        return self.chat or self.text

    def _prompt(
        self, way: Way, asked: Asked, before: str = "", text: str = ""
    ) -> tuple[list[int] | str | list[Mapping[str, Any]] | tuple, list[int] | None]:
        """A prompt and the beginning of its answer as ids, as text, or as a tuple of messages; where the scored
        contents begin in a text."""
        if asked.ids and self._encoder is not None:
            return [*asked.ids, *self._encoder.continuation(before), *self._encoder.continuation(text)], None
        if asked.messages is not None and way.path == CHAT_WAY.path:
            begun = ({"role": "assistant", "content": before + text},) if before + text else ()
            return (*asked.messages, *begun), None
        return asked.plain(before + text)

    def _read(
        self, way: Way, prompt: Any, bill: Bill, gate: Gate = unguarded, attempts: int = ATTEMPTS
    ) -> tuple[list[Token], float]:
        """The tokens of a prompt as the model reads them, and the log-probability that the answer ends there."""
        body: dict[str, Any] = {"model": self._model, **way.fields}
        if isinstance(prompt, tuple):
            body["messages"] = list(prompt)
            if prompt[-1]["role"] == "assistant":
                body |= {"add_generation_prompt": False, "continue_final_message": True}
        else:
            body["prompt"] = prompt
        answer = self._endpoint.ask(way.path, body, gate, attempts)
        usage = answer.get("usage")
        bill.add(usage)
        choice = first_choice(answer)
        count = len(prompt) if isinstance(prompt, list) else usage.get("prompt_tokens") if usage else None
        tokens = prompt_tokens(answer, choice, count)
        if isinstance(prompt, str) and way.name == "echo" and within(tokens, prompt) is None:
            said = "".join(text or "" for text, _ in tokens).strip()
            if said and said not in prompt:
                raise Wrong("they are of the answer only")
        return tokens, end(choice)

    # Trying

    def _check(self, chat: bool) -> None:
        """Wrong or ServerError where the one way is not right."""

        def asked(text: str) -> Asked:
            messages = ({"role": "user", "content": text},) if chat else None
            return Asked([], text, [], [], [], messages, "" if chat else text, ((text, ((0, len(text)),)),))

        for fluent, shuffled in zip(FLUENT, SHUFFLED, strict=True):
            better, worse = (self._sum(asked(text)) for text in (fluent, shuffled))
            if better <= worse:
                raise Wrong("a fluent text is not likelier than the same words shuffled")
        compared = 0
        for text in BEGUN:
            first = asked(text)
            for token, logprob in self._drawn(first):
                (read,) = self.judge(first, "", [token], Bill())
                if read is None or read.starts != [0] or read.ends != [len(token)]:
                    continue  # it meets the text in other tokens
                if abs(read.logprobs[0] - logprob) > _CLOSE + 0.02 * abs(logprob):
                    raise Wrong(
                        f"they are shifted or made up: the first token after a text has {logprob:.2f} when it is drawn "
                        f"and {read.logprobs[0]:.2f} when it is read"
                    )
                compared += 1
            if compared >= 2:
                return
        if not compared:
            raise Wrong("that they are at the right tokens could not be seen")

    def _sum(self, asked: Asked) -> float:
        found = self.score(asked, Bill(), attempts=2)
        if found is None or len(found.logprobs) < 8:
            raise Wrong("there are not as many as tokens of the text")
        if not all(math.isfinite(p) and p <= 1e-3 for p in found.logprobs):
            raise Wrong("they are not log-probabilities, which are numbers of at most 0")
        return math.fsum(found.logprobs)

    def _drawn(self, asked: Asked) -> list[tuple[str, float]]:
        """The likeliest token after a prompt, and one that is less likely, with their log-probabilities."""
        way = self._way(asked)
        assert way is not None
        fields = {name: value for name, value in way.fields.items() if name not in ("prompt_logprobs", "echo")}
        fields["top_logprobs" if asked.messages else "logprobs"] = 5
        prompt = {"prompt": asked.whole} if asked.messages is None else {"messages": list(asked.messages)}
        answer = self._endpoint.ask(way.path, {"model": self._model, **fields, **prompt}, attempts=2)
        choice = first_choice(answer)
        drawn = generated(choice)
        if drawn is None:
            raise Wrong("the server tells none of what it draws, so that the first token cannot be compared")
        others = [(token, p) for token, p in tops(choice) if token.strip() and token != drawn[0]]
        both = [drawn, *sorted(others, key=lambda one: one[1])[:1]]
        return [(token, p) for token, p in both if token and "\ufffd" not in token]
