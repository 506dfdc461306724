"""Reasoning that a model writes before or between its answers, told apart from them by marks.

Each family has marks of its own, spelled as text or as control tokens. Where the chat template opens the reasoning
itself, at the end of the prompt, the answer begins inside of it and holds the closing mark alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from packllm.chat.characters import Characters, Reading, Words

THOUGHTS = {
    "<think>": "</think>",  # Qwen, DeepSeek, GLM, Nemotron, Kimi, ...
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<seed:think>": "</seed:think>",
    "<mm:think>": "</mm:think>",
    "<think:opensource>": "</think:opensource>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought\n": "<channel|>",
    "<|channel|>analysis<|message|>": "<|end|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<|think|>": "<|end|>",
}
"""What closes reasoning, by what opens it."""

_HEADERS = (
    "<|channel|>final<|message|>",
    "<|start|>assistant<|channel|>final<|message|>",
    "<|begin|>assistant<|content|>",
)
"""What some models write before the answer itself."""
_OPENED_IN_PROMPTS = {**THOUGHTS, "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]"}
_OPENING = Words([*THOUGHTS, *_HEADERS])


@dataclass(frozen=True)
class ReasoningPart:
    """A piece of reasoning while an answer streams."""

    text: str


def opened_by(prompt: str) -> str | None:
    """What closes the reasoning that a prompt ends inside of; None where it does not."""
    end = prompt.rstrip()
    return next((close for mark, close in _OPENED_IN_PROMPTS.items() if end.endswith(mark.rstrip())), None)


def marks_in(template: str | None) -> frozenset[str]:
    """The marks of the reasoning that a chat template knows of."""
    known = {mark: close for mark, close in THOUGHTS.items() if mark in (template or "")}
    return frozenset({*known, *known.values(), *(_HEADERS if known else ())})


class Thinking(Characters):
    """Characters, some of them reasoning."""

    def _reason(self, text: str) -> None:
        """Takes a piece of reasoning."""
        raise NotImplementedError

    def _thought(self, close: str) -> Reading:
        """Read reasoning up to and with what closes it; white space around it is not part of it."""
        closing, begun = Words([close]), False
        spaces: list[str] = []
        while character := (yield from self._next()):
            if character in closing.first and (yield from self._word(character, closing)):
                return
            spaces.append(character)
            if not character.isspace():
                self._reason("".join(spaces) if begun else character)
                begun = True
                spaces.clear()


class ReasoningStream(Thinking):
    """Takes the reasoning off the beginning of a growing answer.

    Args:
        close: what closes the reasoning that the prompt has opened, if it has.

    Attributes:
        over: no reasoning can follow; all further text is the answer.
    """

    def __init__(self, close: str | None = None) -> None:
        self.over = False
        self._close = close
        self._reasoning: list[str] = []
        self._text: list[str] = []
        super().__init__()

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """What one more piece makes sure: of the reasoning, and of the answer."""
        if self.over:
            return "", text
        self._put(text)
        if last:
            self._end()
        parts = "".join(self._reasoning), "".join(self._text)
        self._reasoning.clear()
        self._text.clear()
        return parts

    def _reason(self, text: str) -> None:
        self._reasoning.append(text)

    def _read(self) -> Reading:
        close = self._close
        while True:
            if close is not None:
                yield from self._thought(close)
            spaces: list[str] = []
            while (character := (yield from self._next())).isspace():
                spaces.append(character)
            mark = (yield from self._word(character, _OPENING)) if character in _OPENING.first else ""
            if not mark:
                break
            close = THOUGHTS.get(mark, "")
            if not close:
                character = yield from self._next()
                break
        if close is None:
            self._text += spaces
        while character:
            self._text.append(character)
            self.over = not self._again
            character = yield from self._next()
