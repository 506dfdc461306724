"""Parses an answer's text into content, tool calls and reasoning, in one piece or while it is streamed.

Models are trained on different notations of a call. These are parsed, together with each family's marks around them:

- JSON: ``{"name": ..., "arguments": {...}}`` (Hermes, Qwen, Llama 3, Granite, Mistral, Cohere, ...), also in OpenAI's
  nesting, in ``{"tool_calls": [...]}``, in a list, in fenced code, and with small models' typical errors (json_text.py)
- XML: ``<function=name><parameter=key>value</parameter></function>`` (Qwen3-Coder, Seed, StepFun), ``<invoke
  name="...">`` (MiniMax, DeepSeek-V4)
- a name, then arguments: ``name<arg_key>key</arg_key><arg_value>value</arg_value>`` (GLM, Ling), ``name[ARGS]{...}``
  (Mistral), ``name<sep>{...}`` (DeepSeek, Kimi)
- Python: ``[name(key="value"), ...]`` (Llama 4, LFM2)

A text without a mark is a call only if it begins a line and names one of the tools; other JSON may be the answer that
the caller asked for. Reasoning is never parsed for calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packllm.chat.call_forms import CallForms
from packllm.chat.characters import Reading, Words
from packllm.chat.marks import FENCE, OPENING, XML
from packllm.chat.reasoning import THOUGHTS, ReasoningPart
from packllm.chat.tools import CallPart, ParsedAnswer, Tool, check_tools, tool_parameters

AnswerPart = str | ReasoningPart | CallPart


def parse_tool_calls(text: str, tools: Sequence[Tool], *, parallel: bool = True) -> ParsedAnswer:
    """Split a complete answer into content, calls and reasoning. Text that is neither call nor reasoning is content.

    Args:
        text: a complete answer.
        tools: the offered tools; without tools no text is a call.
        parallel: whether an answer may have several calls; otherwise calls after the first are dropped.
    """
    stream = ToolStream(tools, parallel=parallel)
    stream.feed(text)
    stream.finish()
    return stream.answer


@dataclass
class _Part:
    """Successive pieces of one kind. `kind` is "content", "reasoning", or the index of the call whose arguments they
    are."""

    kind: str | int
    pieces: list[str]
    id: str | None = None
    name: str | None = None

    def as_part(self) -> AnswerPart:
        text = "".join(self.pieces)
        if isinstance(self.kind, int):
            return CallPart(self.kind, self.id, self.name, text)
        return ReasoningPart(text) if self.kind == "reasoning" else text


class ToolStream(CallForms):
    """Splits an answer into content, calls and reasoning while it is streamed.

    Text that may become a call is held back until this is decided. The arguments of a JSON call are returned as they
    are written, those of other calls at their end. The time is linear in the length of the text.

    Args:
        tools: the offered tools; without tools no text is a call.
        parallel: whether an answer may have several calls; otherwise calls after the first are dropped.

    Raises:
        OptionError: invalid tools.
    """

    def __init__(self, tools: Sequence[Tool], *, parallel: bool = True) -> None:
        check_tools(tools, None, None)
        self._marks = Words([*THOUGHTS, *(OPENING.whole if tools else ())])
        self._out: list[_Part] = []
        self._spaces: list[str] = []  # white space, content only if more content follows
        self._skipping = False  # white space here is no content
        self._content: list[str] = []
        self._reasoning: list[str] = []
        super().__init__({tool["function"]["name"]: tool_parameters(tool) for tool in tools}, parallel)

    @property
    def answer(self) -> ParsedAnswer:
        """The complete result, once finish() was called."""
        texts = "".join(self._content), tuple(self._calls), tuple(self._invalid), "".join(self._reasoning)
        return ParsedAnswer(*texts)

    def feed(self, text: str) -> list[AnswerPart]:
        """Add a piece of the answer; return the new parts that are now final: content, reasoning, calls, in order."""
        self._put(text)
        return self._take_parts()

    def finish(self) -> list[AnswerPart]:
        """End the answer; return the parts that were held back."""
        self._end()
        if self._spaces and not self._count and not self._skipping:
            self._give("content", "".join(self._spaces))
            self._content += self._spaces
        self._spaces = []
        return self._take_parts()

    def _take_parts(self) -> list[AnswerPart]:
        out, self._out = self._out, []
        return [part.as_part() for part in out]

    def _give(self, kind: str | int, text: str, **first: str) -> None:
        if first or not self._out or self._out[-1].kind != kind:
            self._out.append(_Part(kind, [text], **first))
        else:
            self._out[-1].pieces.append(text)

    # Content and reasoning

    def _say(self, text: str) -> None:
        """Add content. White space at its end waits for more content."""
        for character in text:
            self._blank = character == "\n" or (self._blank and character in " \t")
            if not character.isspace():
                final = "".join([*self._spaces, character])
                self._spaces.clear()
                self._skipping = False
                self._content.append(final)
                self._give("content", final)
            elif not self._skipping:
                self._spaces.append(character)

    def _part_content(self) -> None:
        """What follows is no content; later content begins on a new line."""
        self._spaces = ["\n"] if self._content else []
        self._skipping = True

    def _reason(self, text: str) -> None:
        self._reasoning.append(text)
        self._give("reasoning", text)

    # The answer

    def _read(self) -> Reading:
        while character := (yield from self._next()):
            if character in self._marks.first and (mark := (yield from self._word(character, self._marks))):
                yield from self._marked(mark)
            elif self._may_begin(character):
                yield from self._unmarked(character)
            else:
                self._after = None
                self._say(character)

    def _may_begin(self, character: str) -> bool:
        """Whether a call may begin here without a mark."""
        if not self._parameters:
            return False
        if self._after == "python" and (character.isalpha() or character == "_"):
            return True
        return character in "{[`" and (self._blank or self._after is not None)

    def _marked(self, mark: str) -> Reading:
        if mark in THOUGHTS:
            if not self._blank and self._after is None:  # a mention of the mark, not reasoning
                self._say(mark)
                return
            if self._reasoning:
                self._reason("\n")
            yield from self._thought(THOUGHTS[mark])
            self._part_content()
            self._blank, self._after = True, self._after or "thought"
            return
        before = [mark]
        while True:
            if mark in XML:
                yield from self._xml(mark, "".join(before), anyone=len(before) > 1)
                return
            character = yield from self._skipped(before)
            if not character:
                self._give_up("".join(before))
                return
            mark = (yield from self._word(character, OPENING)) if character in OPENING.first else ""
            if mark:
                before[-1] = mark
            elif character == "`" and (yield from self._word(character, FENCE)):
                before[-1] = "```" + (yield from self._label())
            elif character != "[":
                break
        if character == "{":
            yield from self._object(marked=True)
        else:
            yield from self._named(character)

    def _unmarked(self, character: str) -> Reading:
        before = [character]
        if character == "`":
            if not (yield from self._word(character, FENCE)):
                self._give_up(character)
                return
            before = ["```", (yield from self._label())]
            character = yield from self._skipped(before)
        bracket = character == "["
        if bracket:
            character = yield from self._skipped(before)
        if character == "{":
            yield from self._object(marked=False, before="".join(before[:-1]))
        elif (bracket or self._after == "python") and character:
            yield from self._python_unmarked("".join(before))
        else:
            self._give_up("".join(before))
