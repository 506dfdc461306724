"""Calls of tools read out of an answer's text, whole or while it grows.

Members are trained on different spellings of a call. Read are, with what each family puts around them:

- JSON: ``{"name": ..., "arguments": {...}}`` (Hermes, Qwen, Llama 3, Granite, Mistral, Cohere, ...), also as OpenAI
  nests it, in ``{"tool_calls": [...]}``, in a list, in fenced code, and as small models misspell it (see json_text.py)
- XML: ``<function=name><parameter=key>value</parameter></function>`` (Qwen3-Coder, Seed, StepFun), ``<invoke
  name="...">`` (MiniMax, DeepSeek-V4)
- a name, then arguments: ``name<arg_key>key</arg_key><arg_value>value</arg_value>`` (GLM, Ling), ``name[ARGS]{...}``
  (Mistral), ``name<sep>{...}`` (DeepSeek, Kimi)
- Python: ``[name(key="value"), ...]`` (Llama 4, LFM2)

What no mark announces is a call only where it begins a line and names one of the tools: any other JSON is what the
caller asked for. What is reasoning is no call, whatever stands in it.
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
    """An answer taken apart into content, calls and reasoning; text that is neither stays content as it is.

    Args:
        text: a whole answer.
        tools: the tools that were offered; without any, no text is a call.
        parallel: whether an answer may hold several calls; else those after the first are dropped.
    """
    stream = ToolStream(tools, parallel=parallel)
    stream.feed(text)
    stream.finish()
    return stream.answer


@dataclass
class _Part:
    """Pieces of one kind that follow each other; kind is the index of a call for pieces of its arguments."""

    kind: str | int
    pieces: list[str]
    id: str | None = None
    name: str | None = None

    def made(self) -> AnswerPart:
        text = "".join(self.pieces)
        if isinstance(self.kind, int):
            return CallPart(self.kind, self.id, self.name, text)
        return ReasoningPart(text) if self.kind == "reasoning" else text


class ToolStream(CallForms):
    """Takes an answer apart while it grows.

    Text that may become a call is held back until that is known. The arguments of a call in JSON are given out as
    they are written, those of other calls at their end. The work is linear in the text.

    Args:
        tools: the tools that were offered; without any, no text is a call.
        parallel: whether an answer may hold several calls; else those after the first are dropped.

    Raises:
        OptionError: tools that could not be offered.
    """

    def __init__(self, tools: Sequence[Tool], *, parallel: bool = True) -> None:
        check_tools(tools, None, None)
        self._marks = Words([*THOUGHTS, *(OPENING.whole if tools else ())])
        self._out: list[_Part] = []
        self._spaces: list[str] = []  # white space that is content only if more content follows
        self._skipping = False  # white space right here is not content
        self._content: list[str] = []
        self._reasoning: list[str] = []
        super().__init__({tool["function"]["name"]: tool_parameters(tool) for tool in tools}, parallel)

    @property
    def answer(self) -> ParsedAnswer:
        """All of it, once finish() was called."""
        texts = "".join(self._content), tuple(self._calls), tuple(self._invalid), "".join(self._reasoning)
        return ParsedAnswer(*texts)

    def feed(self, text: str) -> list[AnswerPart]:
        """What one more piece of the answer makes sure: content, reasoning and parts of calls, in order."""
        self._put(text)
        return self._taken()

    def finish(self) -> list[AnswerPart]:
        """What was still held back, once no more text comes."""
        self._end()
        if self._spaces and not self._count and not self._skipping:
            self._give("content", "".join(self._spaces))
            self._content += self._spaces
        self._spaces = []
        return self._taken()

    def _taken(self) -> list[AnswerPart]:
        out, self._out = self._out, []
        return [part.made() for part in out]

    def _give(self, kind: str | int, text: str, **first: str) -> None:
        if first or not self._out or self._out[-1].kind != kind:
            self._out.append(_Part(kind, [text], **first))
        else:
            self._out[-1].pieces.append(text)

    # Content and reasoning

    def _say(self, text: str) -> None:
        """The text is content, but for white space at its end, which waits for what follows."""
        for character in text:
            self._blank = character == "\n" or (self._blank and character in " \t")
            if not character.isspace():
                sure = "".join([*self._spaces, character])
                self._spaces.clear()
                self._skipping = False
                self._content.append(sure)
                self._give("content", sure)
            elif not self._skipping:
                self._spaces.append(character)

    def _part_content(self) -> None:
        """What comes next is no content; what content follows begins on a line of its own."""
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
            if not self._blank and self._after is None:  # told of, not used
                self._say(mark)
                return
            if self._reasoning:
                self._reason("\n")
            yield from self._thought(THOUGHTS[mark])
            self._part_content()
            self._blank, self._after = True, self._after or "thought"
            return
        held = [mark]
        while True:
            if mark in XML:
                yield from self._xml(mark, "".join(held), anyone=len(held) > 1)
                return
            character = yield from self._skipped(held)
            if not character:
                self._give_up("".join(held))
                return
            mark = (yield from self._word(character, OPENING)) if character in OPENING.first else ""
            if mark:
                held[-1] = mark
            elif character == "`" and (yield from self._word(character, FENCE)):
                held[-1] = "```" + (yield from self._label())
            elif character != "[":
                break
        if character == "{":
            yield from self._object(marked=True)
        else:
            yield from self._named(character)

    def _unmarked(self, character: str) -> Reading:
        held = [character]
        if character == "`":
            if not (yield from self._word(character, FENCE)):
                self._give_up(character)
                return
            held = ["```", (yield from self._label())]
            character = yield from self._skipped(held)
        bracket = character == "["
        if bracket:
            character = yield from self._skipped(held)
        if character == "{":
            yield from self._object(marked=False, before="".join(held[:-1]))
        elif (bracket or self._after == "python") and character:
            yield from self._python_unmarked("".join(held))
        else:
            self._give_up("".join(held))
