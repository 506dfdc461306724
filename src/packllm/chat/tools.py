"""Tools: what a caller may offer, how members that know no tools are told of them, and calls read out of text.

Members are trained on different spellings of a call; ToolStream reads the common ones out of the fused text:

- Hermes and Qwen: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``
- Llama 3: ``<|python_tag|>{"name": ..., "parameters": {...}}``, or the same without the tag
- plain JSON ``{"name": ..., "arguments": {...}}``, alone, in a list or in fenced code

JSON that no markup announces is a call only where it begins a line and names one of the tools: any other JSON is
what the caller asked for.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from packllm.errors import OptionError

Tool = Mapping[str, Any]
CHOICES = ("auto", "none", "any")
RESERVED = (*CHOICES, "required")

_ID_LETTERS = string.ascii_letters + string.digits
# Possessive: "```j" is the beginning of "```json", and not a call that begins with j.
_MARK = r"(?P<mark><tool_call>|<\|python_tag\|>)\s*(?:```\w*+\s*)?\[?\s*(?=[^\s\[`])"
_FENCE = r"(?:```(?:json|tool_call)?[ \t]*\n\s*)?\[?\s*"
_CLOSING = ("</tool_call>", "<|eom_id|>", "```", ",", ";", "]")
_BEFORE_ARGUMENTS = regex.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True)
class ToolCall:
    """A call that a member made: which tool, with which arguments. `id` is unique."""

    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class InvalidToolCall:
    """A call that cannot be read: what was written, and what is wrong with it."""

    id: str
    name: str
    arguments: str
    error: str


@dataclass(frozen=True)
class ParsedAnswer:
    """An answer taken apart: the text beside the calls, the calls in order, and calls that cannot be read."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    invalid: tuple[InvalidToolCall, ...] = ()


@dataclass(frozen=True)
class CallPart:
    """A piece of a call while it streams.

    Attributes:
        index: number of the call in the answer, invalid ones included.
        id, name: of the call, on its first part only.
        arguments: piece of the JSON text of the arguments; all pieces joined are the whole.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


def check_tools(tools: Sequence[Tool], tool_choice: str | None, json_schema: Mapping[str, Any] | None) -> None:
    """OptionError unless the three make sense, alone and together."""
    names = [_checked_name(tool, at) for at, tool in enumerate(tools)]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"tools hold {names.count(name)} tools of the name {name!r}; give each its own name")
        if name in RESERVED:
            raise OptionError(f"a tool is called {name!r}, which tool_choice keeps for itself; rename the tool")
    if tool_choice is not None and not tools:
        raise OptionError(f"tool_choice={tool_choice!r} without tools; give tools, or leave tool_choice out")
    if tool_choice is not None and tool_choice not in (*CHOICES, *names):
        raise OptionError(f"tool_choice={tool_choice!r} is none of {', '.join(map(repr, (*CHOICES, *names)))}")
    if json_schema is not None:
        _check_json(json_schema, "json_schema")
        if tool_choice not in (None, "auto", "none"):
            raise OptionError(
                f"tool_choice={tool_choice!r} demands a tool call and json_schema demands an answer; "
                f"give one of them, or tool_choice='auto' to leave the choice to the model"
            )


def _checked_name(tool: Tool, at: int) -> str:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise OptionError(
            f'tools[{at}] must look like {{"type": "function", "function": {{"name": ..., "description": ..., '
            f'"parameters": JSON schema}}}}, not {tool!r}'
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise OptionError(f"tools[{at}] has the name {name!r}; a tool's name is text of at least one character")
    if not isinstance(parameters, Mapping | None):
        raise OptionError(f"parameters of the tool {name!r} must be a JSON schema of an object, not {parameters!r}")
    if parameters and parameters.get("type", "object") != "object":
        raise OptionError(f"parameters of the tool {name!r} must have type 'object', not {parameters['type']!r}")
    _check_json(tool, f"the tool {name!r}")
    return name


def _check_json(value: Any, what: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{what} is not JSON: {error}") from None


def tool_names(tools: Sequence[Tool]) -> list[str]:
    """Names of checked tools."""
    return [tool["function"]["name"] for tool in tools]


def new_call_id() -> str:
    """Nine letters and digits: unique, and of the form that Mistral's templates insist on."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


def parse_tool_calls(text: str, tools: Sequence[Tool]) -> ParsedAnswer:
    """An answer taken apart into content and calls; text that is no call stays content as it is.

    Args:
        text: a whole answer.
        tools: the tools that were offered; without any, all of the text is content.
    """
    stream = ToolStream(tools)
    stream.feed(text)
    stream.finish()
    return stream.answer


class ToolStream:
    """Takes an answer apart while it grows.

    Text that may become a call is held back until that is known. The arguments of a call are given out as they are
    written.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._names = tool_names(tools)
        names = "|".join(map(_spelled, sorted(self._names)))
        # An object that names no tool in its first key may still be a call: that is seen at its end.
        key = rf'(?=\{{\s*"(?:name"\s*:\s*(?:{names})|(?:id|type|function|arguments|parameters)"\s*:))'
        self._begins = regex.compile(rf"{_MARK}|^[ \t]*{_FENCE}{key}", regex.MULTILINE)
        self._follows = regex.compile(rf"{_MARK}|{key}")
        self._text = ""
        self._at = 0  # all of the text before this is dealt with
        self._space = ""  # white space that is content only if more content follows
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._invalid: list[InvalidToolCall] = []
        self._open: _OpenCall | None = None
        self._after = False  # a call just ended; what closes it may follow

    @property
    def answer(self) -> ParsedAnswer:
        """All of it, once finish() was called."""
        return ParsedAnswer("".join(self._content), tuple(self._calls), tuple(self._invalid))

    def feed(self, text: str) -> list[str | CallPart]:
        """What one more piece of the answer makes sure: content and parts of calls, in order."""
        return self._take(text, last=False)

    def finish(self) -> list[str | CallPart]:
        """What was still held back, once no more text comes."""
        out = self._take("", last=True)
        if self._space and not self._calls and not self._invalid:
            out.append(self._space)
            self._content.append(self._space)
        return out

    def _take(self, text: str, last: bool) -> list[str | CallPart]:
        self._text += text
        out: list[str | CallPart] = []
        if not self._names:
            self._say(len(self._text), out)
            return out
        while self._at < len(self._text) or (last and self._open):
            if not (self._go_on(out, last) if self._open else self._look(out, last)):
                break
        return out

    def _say(self, end: int, out: list[str | CallPart]) -> None:
        """The text up to `end` is content, but for white space at its end, which waits for what follows."""
        whole = self._space + self._text[self._at : end]
        self._at = end
        sure = whole.rstrip()
        self._space = whole[len(sure) :]
        if sure:
            self._content.append(sure)
            out.append(sure)

    def _look(self, out: list[str | CallPart], last: bool) -> bool:
        """Give out content up to where a call begins; False if more text is needed to tell."""
        partial = not last
        if self._after:
            self._skip_closing()
            rest = self._text[self._at :]
            if partial and any(closing.startswith(rest) for closing in _CLOSING):
                return False
            found = self._follows.match(self._text, self._at, partial=partial)
            if found and found.partial:
                return False
            self._after = False
        else:
            found = None
        found = found or self._begins.search(self._text, self._at, partial=partial)
        self._say(found.start() if found else len(self._text), out)
        if found and found.partial:
            return False
        if found:
            self._open = _OpenCall(self._at, found.end(), len(self._calls) + len(self._invalid), bool(found["mark"]))
        return True

    def _skip_closing(self) -> None:
        while True:
            rest = self._text[self._at :]
            closing = next((closing for closing in _CLOSING if rest.startswith(closing)), rest[:1])
            if closing not in _CLOSING and not closing.isspace():
                return
            self._at += len(closing)

    def _go_on(self, out: list[str | CallPart], last: bool) -> bool:
        """Read on in a call; False if it has not ended."""
        call = self._open
        assert call is not None
        ended = call.scan(self._text)
        out.extend(call.parts(self._text))
        if not ended and not last:
            return False
        self._open = None
        name, arguments, error = _read(self._text[call.begin : call.at])
        if not (call.marked or call.streamed or name in self._names):
            self._say(call.at, out)  # JSON, but not a call
            return True
        self._at, self._after = call.at, True
        self._space = "\n" if self._content else ""
        if isinstance(arguments, dict) and name:
            self._calls.append(ToolCall(call.id, name, arguments))
            said = json.dumps(arguments, ensure_ascii=False)
        else:
            said = call.said or self._text[call.begin : call.at].strip()
            self._invalid.append(InvalidToolCall(call.id, name, said, error))
        if not call.streamed:
            out.append(CallPart(call.index, call.id, name, said))
        return True


class _OpenCall:
    """A call while it is written: text[start:] is it with its mark, text[begin:at] what was read of it."""

    def __init__(self, start: int, begin: int, index: int, marked: bool) -> None:
        self.start, self.begin, self.at = start, begin, begin
        self.index, self.marked = index, marked
        self.id = new_call_id()
        self.said = ""  # arguments given out so far
        self.streamed = False
        self._depth, self._quoted, self._escaped = 0, False, False
        self._opened = 0  # where the arguments begin
        self._closed: int | None = None  # where they end

    def scan(self, text: str) -> bool:
        """Read on to the end of the object; whether that was reached. What is no object ends with its line."""
        if not text.startswith("{", self.begin):
            ends = [at for at in (text.find("</tool_call>", self.begin), text.find("\n", self.begin)) if at >= 0]
            self.at = min(ends, default=len(text))
            return bool(ends)
        while self.at < len(text):
            letter = text[self.at]
            self.at += 1
            if self._escaped:
                self._escaped = False
            elif letter == "\\" and self._quoted:
                self._escaped = True
            elif letter == '"':
                self._quoted = not self._quoted
            elif letter == "<" and not self._quoted and "</tool_call>".startswith(text[self.at - 1 : self.at + 11]):
                self.at -= 1
                return len(text) - self.at >= len("</tool_call>")  # else wait for the rest of it
            elif not self._quoted and letter in "{[":
                self._depth += 1
            elif not self._quoted and letter in "}]":
                self._depth -= 1
                if self._depth == 1 and self._closed is None:
                    self._closed = self.at
                if self._depth == 0:
                    return True
        return False

    def parts(self, text: str) -> list[CallPart]:
        """What of the arguments is new, once the name before them is known."""
        name = None
        if not self.streamed:
            found = _BEFORE_ARGUMENTS.match(text, self.begin, self.at)
            name = _loads(found[1]) if found else None
            if found is None or name is None:
                return []
            self.streamed, self._opened = True, found.end()
        new = text[self._opened + len(self.said) : self._closed or self.at]
        self.said += new
        return [CallPart(self.index, self.id if name else None, name, new)] if new or name else []


def _read(written: str) -> tuple[str, dict[str, Any] | None, str]:
    """Name and arguments of a call as written, and what is wrong with it. Without a name it is no call."""
    value = _loads(written)
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):  # as OpenAI writes it
        value = value["function"]
    if not isinstance(value, Mapping):
        found = regex.search(r'"name"\s*:\s*("(?:[^"\\]|\\.)*")', written)
        name = _loads(found[1]) if found else None
        return name or "", None, "the call is not a JSON object; it may have been cut off by max_tokens"
    name = value.get("name")
    if not isinstance(name, str) or not name or not value.keys() & {"arguments", "parameters"}:
        return "", None, 'a call is {"name": ..., "arguments": {...}}'
    arguments = value["arguments"] if "arguments" in value else value["parameters"]
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return name, None, f"the arguments of {name!r} are not a JSON object"
    return name, arguments, ""


def _spelled(name: str) -> str:
    """Pattern of all ways to write a name as a JSON string."""
    pattern = ""
    for letter in name:
        units = letter.encode("utf-16-be").hex()
        escaped = "".join(rf"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
        short = r"\\?/" if letter == "/" else regex.escape(json.dumps(letter, ensure_ascii=False)[1:-1])
        pattern += f"(?:{short}|(?i:{escaped}))"
    return f'"{pattern}"'


def _loads(text: str) -> Any:
    """JSON as a value; None for what is not JSON of Unicode text and finite numbers."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError):
        return None
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
