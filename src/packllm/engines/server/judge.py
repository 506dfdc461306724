"""Log-probabilities of prompts from a server, and tests of whether they are right.

vLLM returns them as `prompt_logprobs`, other servers with `echo`. Some servers return those of the answer only, others
shift them by one token. Each server is therefore tested on known texts when it is connected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from packllm.align.words import offsets
from packllm.chat.prompt import Encoded, Encoder
from packllm.engines.server.answers import (
    Placed,
    TextLogprobs,
    Token,
    UnusableAnswer,
    end,
    first_choice,
    generated,
    located,
    prompt_tokens,
    tops,
    within,
)
from packllm.engines.server.http import ATTEMPTS, Endpoint, Gate, ServerError, no_gate, together
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

_CLOSE = 0.2  # largest difference in nats between a token's log-probability when generated and when read


@dataclass(frozen=True)
class Asked(Encoded):
    """A prompt in the form of a server's request. It has token ids only if the server's tokenizer is known.

    Attributes:
        messages: the conversation; None if the prompt is a text to continue.
        whole: that text.
        words: the texts that are scored, each with its scored parts (start, stop) in characters.
        variables: variables of the chat template.
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    whole: str = ""
    words: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    def plain(self, answer: str = "") -> tuple[str, list[int]]:
        """The prompt and the beginning of its answer as one text, with one line for each message of a conversation;
        and the start of each scored text in it."""
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
class Method:
    """A kind of request that returns log-probabilities of a prompt."""

    name: str
    path: str
    fields: Mapping[str, Any]


_TEXT = {"max_tokens": 1, "temperature": 0, "logprobs": 1}
_CHAT = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 1}
TEXT_METHODS = (
    Method("prompt_logprobs", "/completions", {**_TEXT, "prompt_logprobs": 1}),
    Method("echo", "/completions", {**_TEXT, "echo": True}),
)
CHAT_METHOD = Method("prompt_logprobs", "/chat/completions", {**_CHAT, "prompt_logprobs": 1})


class Judge:
    """Reads log-probabilities of prompts from a server.

    Args:
        model: the model's name on the server.
        text: the kind of request for texts; None if the server supports none.
        chat: the kind of request for conversations. Without it, a conversation is sent as plain text.
        encoder: of the server's tokenizer, if known; prompts are then sent as token ids.
    """

    def __init__(
        self, endpoint: Endpoint, model: str, text: Method | None, chat: Method | None, encoder: Encoder | None = None
    ) -> None:
        self._endpoint, self._model, self.text, self.chat, self._encoder = endpoint, model, text, chat, encoder

    @classmethod
    def of(cls, endpoint: Endpoint, model: str, encoder: Encoder | None = None) -> tuple[Judge | None, str]:
        """Find the kinds of requests for which a server returns correct log-probabilities.

        Returns:
            A judge, or None if there are none; and a sentence that says what was found.
        """
        methods: dict[str, Method] = {}
        reasons = []
        for method in TEXT_METHODS:
            try:
                cls(endpoint, model, method, None)._check(chat=False)
                methods["text"] = method
                break
            except ServerError as error:
                reasons.append(f"{method.name}: {error}")
        if "text" not in methods or methods["text"].name == CHAT_METHOD.name:
            try:
                cls(endpoint, model, None, CHAT_METHOD)._check(chat=True)
                methods["chat"] = CHAT_METHOD
            except ServerError as error:
                reasons.append(f"in conversations: {error}")
        if not methods:
            return None, "no usable log-probabilities of prompts: " + "; ".join(reasons)
        names = ", ".join(f"{method.name} of {method.path}" for method in methods.values())
        by_ids = encoder if "text" in methods else None
        judge = cls(endpoint, model, methods.get("text"), methods.get("chat"), by_ids)
        return judge, f"its log-probabilities of prompts are correct ({names})"

    # Reading

    def score(self, asked: Asked, bill: Bill, gate: Gate = no_gate, attempts: int = ATTEMPTS) -> TextLogprobs | None:
        """Log-probabilities of the scored text of a prompt; offsets refer to that text.

        Returns:
            None if the tokens cannot be located in the text.

        Raises:
            ServerError: the server failed, or its answer differs in form from those at the test.
        """
        method = self._method(asked)
        if method is None:
            return None
        prompt, begins = self._prompt(method, asked)
        tokens, ended = self._read(method, prompt, bill, gate, attempts)
        if isinstance(prompt, list):
            logprobs = [tokens[at][1] for at in asked.positions]
            if None in logprobs:
                raise UnusableAnswer("log-probabilities are missing")
            return TextLogprobs(list(asked.starts), list(asked.ends), [p for p in logprobs if p is not None], ended)
        spans = within(tokens, prompt) if isinstance(prompt, str) else None
        result, base, at = TextLogprobs([], [], [], ended), 0, 0
        for n, (text, parts) in enumerate(asked.words):
            if begins is None:  # in the server's own template
                match = located(tokens, text, at)
                if match is None:
                    return None
                placed, at = match
            elif spans is None:
                return None
            else:
                placed = [(i, low - begins[n], high - begins[n]) for i, low, high in spans]
            for start, stop in parts:
                for i, low, high in placed:
                    logprob = tokens[i][1]
                    if start <= low < high <= stop and logprob is not None:
                        result.starts.append(low - start + base)
                        result.ends.append(high - start + base)
                        result.logprobs.append(logprob)
                base += stop - start
        return result

    def judge(
        self, asked: Asked, before: str, texts: Sequence[str], bill: Bill, gate: Gate = no_gate
    ) -> list[TextLogprobs | None]:
        """Log-probabilities of each of several texts that follow a prompt and `before`; offsets refer to each text.

        Returns:
            None for a text whose tokens cannot be located.

        Raises:
            ServerError: as score().
        """
        method = self._method(asked)
        if method is None:
            return [None] * len(texts)
        return together([partial(self._judge_one, method, asked, before, text, bill, gate) for text in texts])

    def _judge_one(
        self, method: Method, asked: Asked, before: str, text: str, bill: Bill, gate: Gate
    ) -> TextLogprobs | None:
        prompt, _ = self._prompt(method, asked, before, text)
        tokens, ended = self._read(method, prompt, bill, gate)
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
            match = located(tokens, before + text, 0, to_end=True)
            placed = None if match is None else [(i, a - len(before), b - len(before)) for i, a, b in match[0]]
        if placed is None:
            return None
        inside = [(i, max(low, 0), high) for i, low, high in placed if high > 0 and tokens[i][1] is not None]
        starts, ends = [low for _, low, _ in inside], [high for _, _, high in inside]
        return TextLogprobs(starts, ends, [tokens[i][1] or 0.0 for i, _, _ in inside], ended)

    def _method(self, asked: Asked) -> Method | None:
        if asked.messages is None or (asked.ids and self._encoder is not None):
            return self.text
        return self.chat or self.text

    def _prompt(
        self, method: Method, asked: Asked, before: str = "", text: str = ""
    ) -> tuple[list[int] | str | list[Mapping[str, Any]] | tuple, list[int] | None]:
        """A prompt and the beginning of its answer: token ids, a text, or a tuple of messages. For a text, also the
        start of each scored text in it."""
        if asked.ids and self._encoder is not None:
            return [*asked.ids, *self._encoder.continuation(before), *self._encoder.continuation(text)], None
        if asked.messages is not None and method.path == CHAT_METHOD.path:
            begun = ({"role": "assistant", "content": before + text},) if before + text else ()
            return (*asked.messages, *begun), None
        return asked.plain(before + text)

    def _read(
        self, method: Method, prompt: Any, bill: Bill, gate: Gate = no_gate, attempts: int = ATTEMPTS
    ) -> tuple[list[Token], float]:
        """The tokens of a prompt with their log-probabilities, and the log-probability that the answer ends there."""
        body: dict[str, Any] = {"model": self._model, **method.fields}
        if isinstance(prompt, tuple):
            body["messages"] = list(prompt)
            if prompt[-1]["role"] == "assistant":
                body |= {"add_generation_prompt": False, "continue_final_message": True}
        else:
            body["prompt"] = prompt
        answer = self._endpoint.ask(method.path, body, gate, attempts)
        usage = answer.get("usage")
        bill.add(usage)
        choice = first_choice(answer)
        count = len(prompt) if isinstance(prompt, list) else usage.get("prompt_tokens") if usage else None
        tokens = prompt_tokens(answer, choice, count)
        if isinstance(prompt, str) and method.name == "echo" and within(tokens, prompt) is None:
            spelled = "".join(text or "" for text, _ in tokens).strip()
            if spelled and spelled not in prompt:
                raise UnusableAnswer("the server returns those of the answer only")
        return tokens, end(choice)

    # Tests at connection

    def _check(self, chat: bool) -> None:
        """Test one kind of request.

        Raises:
            UnusableAnswer: the log-probabilities are not correct.
            ServerError: the server failed.
        """

        def asked(text: str) -> Asked:
            messages = ({"role": "user", "content": text},) if chat else None
            return Asked([], text, [], [], [], messages, "" if chat else text, ((text, ((0, len(text)),)),))

        for fluent, shuffled in zip(FLUENT, SHUFFLED, strict=True):
            better, worse = (self._sum(asked(text)) for text in (fluent, shuffled))
            if better <= worse:
                raise UnusableAnswer("a fluent text is not likelier than the same words shuffled")
        compared = 0
        for text in BEGUN:
            first = asked(text)
            for token, logprob in self._next_tokens(first):
                (read,) = self.judge(first, "", [token], Bill())
                if read is None or read.starts != [0] or read.ends != [len(token)]:
                    continue  # the server tokenizes it differently after the text
                if abs(read.logprobs[0] - logprob) > _CLOSE + 0.02 * abs(logprob):
                    raise UnusableAnswer(
                        f"they are shifted or made up: the first token after a text has {logprob:.2f} when it is "
                        f"generated and {read.logprobs[0]:.2f} when it is read"
                    )
                compared += 1
            if compared >= 2:
                return
        if not compared:
            raise UnusableAnswer("whether they belong to the right tokens could not be tested")

    def _sum(self, asked: Asked) -> float:
        result = self.score(asked, Bill(), attempts=2)
        if result is None or len(result.logprobs) < 8:
            raise UnusableAnswer("there are fewer than the text has tokens")
        if not all(math.isfinite(p) and p <= 1e-3 for p in result.logprobs):
            raise UnusableAnswer("they are not log-probabilities, which are numbers of at most 0")
        return math.fsum(result.logprobs)

    def _next_tokens(self, asked: Asked) -> list[tuple[str, float]]:
        """The most likely token after a prompt and a less likely one, with their log-probabilities."""
        method = self._method(asked)
        assert method is not None
        fields = {name: value for name, value in method.fields.items() if name not in ("prompt_logprobs", "echo")}
        fields["top_logprobs" if asked.messages else "logprobs"] = 5
        prompt = {"prompt": asked.whole} if asked.messages is None else {"messages": list(asked.messages)}
        answer = self._endpoint.ask(method.path, {"model": self._model, **fields, **prompt}, attempts=2)
        choice = first_choice(answer)
        drawn = generated(choice)
        if drawn is None:
            raise UnusableAnswer("the server returns none for generated tokens, so the first token cannot be compared")
        others = [(token, p) for token, p in tops(choice) if token.strip() and token != drawn[0]]
        both = [drawn, *sorted(others, key=lambda one: one[1])[:1]]
        return [(token, p) for token, p in both if token and "\ufffd" not in token]
