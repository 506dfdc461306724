"""Separates the reasoning that a model writes before its answer from the answer, by marks.

Each family has its own marks, spelled as text or as control tokens. Some chat templates open the reasoning at the end
of the prompt: then the answer begins inside it and contains only the closing mark.
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
"""The closing mark of reasoning, by its opening mark."""

_HEADERS = (
    "<|channel|>final<|message|>",
    "<|start|>assistant<|channel|>final<|message|>",
    "<|begin|>assistant<|content|>",
)
"""Headers that some models write before the answer itself."""
_OPENED_IN_PROMPTS = {**THOUGHTS, "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]"}
_OPENING = Words([*THOUGHTS, *_HEADERS])


@dataclass(frozen=True)
class ReasoningPart:
    """A piece of reasoning in a streamed answer."""

    text: str


def opened_by(prompt: str) -> str | None:
    """The closing mark of the reasoning that the end of a prompt opens; None if it opens none."""
    end = prompt.rstrip()
    return next((close for mark, close in _OPENED_IN_PROMPTS.items() if end.endswith(mark.rstrip())), None)


def marks_in(template: str | None) -> frozenset[str]:
    """The marks of reasoning that occur in a chat template."""
    used = {mark: close for mark, close in THOUGHTS.items() if mark in (template or "")}
    return frozenset({*used, *used.values(), *(_HEADERS if used else ())})


class Thinking(Characters):
    """A parser of text that may contain reasoning."""

    def _reason(self, text: str) -> None:
        """Collect a piece of reasoning."""
        raise NotImplementedError

    def _thought(self, close: str) -> Reading:
        """Read reasoning including its closing mark, without the white space around it."""
        closing, started = Words([close]), False
        spaces: list[str] = []
        while character := (yield from self._next()):
            if character in closing.first and (yield from self._word(character, closing)):
                return
            spaces.append(character)
            if not character.isspace():
                self._reason("".join(spaces) if started else character)
                started = True
                spaces.clear()


class ReasoningStream(Thinking):
    """Separates the reasoning at the beginning of a growing answer.

    Args:
        close: the closing mark of the reasoning that the prompt opens; None if it opens none.

    Attributes:
        over: whether no more reasoning can follow; then all further text is the answer.
        inside: whether the text so far ends inside reasoning.
        closed: how many closing marks were read.
    """

    def __init__(self, close: str | None = None) -> None:
        self.over = self.inside = False
        self.closed = 0
        self._close = close
        self._reasoning: list[str] = []
        self._text: list[str] = []
        super().__init__()

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """Add a piece; return the (reasoning, answer) that is now final."""
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
                self.inside = True
                yield from self._thought(close)
                self.inside = False
                self.closed += 1
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
