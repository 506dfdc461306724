"""The notations of tool calls. Each is parsed one character at a time from its first character on (see calls.py)."""

from __future__ import annotations

import json
import string
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex

from packllm.chat.arguments import python_arguments, tagged_arguments, xml_arguments
from packllm.chat.characters import Reading
from packllm.chat.json_text import SPACE, JsonText, loads
from packllm.chat.marks import AFTER_NAME, CLOSING, ENDS_XML, FENCE, NAME_FOLLOWS, TAGGED, XML
from packllm.chat.reasoning import Thinking
from packllm.chat.tools import InvalidToolCall, ToolCall, new_call_id

_NAME_KEYS = ("name", "tool_name")
_ARGUMENT_KEYS = ("arguments", "parameters")
_FIRST_KEYS = (*_NAME_KEYS, *_ARGUMENT_KEYS, "id", "type", "function", "tool_calls", "tool_call_id")


@dataclass
class _Call:
    """A call whose text is still coming in."""

    index: int
    id: str = field(default_factory=new_call_id)
    said: list[str] = field(default_factory=list)
    streamed: bool = False


class CallForms(Thinking):
    """Parses calls. A subclass finds where they begin, and collects calls and other content."""

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]], parallel: bool) -> None:
        self._parameters = parameters  # JSON schemas of the arguments, by tool
        self._longest = max(map(len, parameters), default=0)
        self._parallel = parallel
        self._calls: list[ToolCall] = []
        self._invalid: list[InvalidToolCall] = []
        self._count = 0
        self._blank = True  # the current line has only white space so far
        self._after: str | None = None  # what was just read: "call", "python" or "thought"
        super().__init__()

    def _say(self, text: str) -> None:
        """Collect content."""
        raise NotImplementedError

    def _part_content(self) -> None:
        """What follows is no content; later content begins on a new line."""
        raise NotImplementedError

    def _give(self, kind: int, text: str, **first: str) -> None:
        """Collect a piece of the arguments of call number `kind`; `first`: its id and name."""
        raise NotImplementedError

    def _give_up(self, read: str) -> None:
        """`read` is no call: its first character is content, and the rest is parsed again."""
        self._say(read[0])
        self._unread(read[1:])
        self._after = None

    def _label(self) -> Generator[None, str, str]:
        """The label of fenced code: the letters, "_" and "-" right after the fence."""
        letters: list[str] = []
        while (character := (yield from self._next())).isalpha() or character in ("_", "-"):
            letters.append(character)
        self._unread(character)
        return "".join(letters)

    def _skipped(self, characters: list[str]) -> Generator[None, str, str]:
        """The next character that is no white space; all characters are added to `held`."""
        while True:
            character = yield from self._next()
            characters.append(character)
            if not character or character not in SPACE:
                return character

    def _closed(self, kind: str) -> Reading:
        """Skip the end marks of a call."""
        self._part_content()
        self._after, self._blank = kind, False
        fences = 1
        while character := (yield from self._next()):
            if character in ",;]" or character.isspace():
                self._blank = character == "\n" or (self._blank and character in " \t")
            elif character in CLOSING.first and (yield from self._word(character, CLOSING)):
                self._blank = False
            elif character == "`" and fences and (yield from self._word(character, FENCE)):
                self._blank, fences = False, 0
            else:
                self._unread(character)
                return

    def _object(self, marked: bool, before: str = "") -> Reading:
        """Parse one or several calls in a JSON object whose "{" was read. `before`: text held back before it."""
        scan, call = JsonText(), _Call(self._count)
        scan.push("{")
        is_call = marked
        while not scan.done and (character := (yield from self._next())):
            if character == "<" and not scan.quoted and (mark := (yield from self._word(character, CLOSING))):
                self._unread(mark)
                break
            scan.push(character)
            if not is_call:
                verdict = self._begins_call(scan)
                if verdict is False:
                    self._give_up(before + "".join(scan.raw))
                    return
                is_call = bool(verdict)
            self._stream(scan, call)
        scan.finish()
        source = "".join(scan.raw)
        calls, error = _calls_in(loads("".join(scan.text)) if scan.done else None, self._parameters if marked else ())
        named = [name for name, _ in calls if name in self._parameters]
        if not scan.done and not marked and not call.streamed:
            match = regex.search(r'"name"\s*+:\s*+"((?:[^"\\]|\\.)*+)"', source)
            named = [match[1]] if match and match[1] in self._parameters else []
        if not (marked or call.streamed or named):
            self._say(before + source)  # JSON that is no call
            self._after = None
            return
        if call.streamed:
            arguments_text = "".join(call.said)
            # Models often forget the last brace of the call, or it is cut off.
            arguments = loads(arguments_text) if scan.arguments_end else None
            self._add(call, scan.name, arguments, arguments_text, error)
        elif not calls:
            self._add(call, named[0] if named else "", None, source.strip(), error)
        else:
            for name, arguments in calls:
                arguments_text = source.strip() if arguments is None else ""
                self._add(call, name, arguments, arguments_text, error)
                call = _Call(self._count)
        yield from self._closed("call")

    def _begins_call(self, scan: JsonText) -> bool | None:
        """Whether an object without a mark before it may be a call; None while undecided."""
        head, partial = scan.head, scan.string
        if not head:
            return None if partial is None or any(key.startswith(partial) for key in _FIRST_KEYS) else False
        key = head[0][1:-1]
        if head[0][0] != '"' or key not in _FIRST_KEYS or (len(head) > 1 and head[1] != ":"):
            return False
        if len(head) == 1:
            return None
        if key not in _NAME_KEYS:
            return True
        if len(head) > 2:
            return head[2][:1] == '"' and loads(head[2]) in self._parameters
        if partial is None:
            return None
        if "\\" in partial:  # an escaped character may take up to twelve
            return None if len(partial) <= 12 * self._longest else False
        return None if any(name.startswith(partial) for name in self._parameters) else False

    def _stream(self, scan: JsonText, call: _Call, name: str | None = None) -> None:
        """Return the new part of the arguments to the caller."""
        if scan.arguments_at is None:
            return
        text = scan.text[scan.arguments_at + len(call.said) : scan.arguments_end]
        if not text and call.streamed:
            return
        if self._parallel or not self._count:
            first = {} if call.streamed else {"id": call.id, "name": name or scan.name}
            self._give(call.index, "".join(text), **first)
        call.streamed = True
        call.said += text

    def _add(self, call: _Call, name: str, arguments: dict[str, Any] | None, text: str, error: str = "") -> None:
        """Add a complete call."""
        if self._count and not self._parallel:
            return
        self._count += 1
        if arguments is not None and name:
            self._calls.append(ToolCall(call.id, name, arguments))
            text = json.dumps(arguments, ensure_ascii=False)
        else:
            self._invalid.append(InvalidToolCall(call.id, name, text, error or _CUT))
        if not call.streamed:
            self._give(call.index, text, id=call.id, name=name)

    def _unreadable(self, characters: list[str], error: str) -> Reading:
        """Add an invalid call in no known notation; it ends with its line, or at an end mark."""
        while (character := (yield from self._next())) and character != "\n":
            if character in CLOSING.first and (mark := (yield from self._word(character, CLOSING))):
                character = mark
                break
            characters.append(character)
        self._unread(character)
        self._add(_Call(self._count), "", None, "".join(characters).strip(), error)
        yield from self._closed("call")

    def _xml(self, mark: str, before: str, anyone: bool) -> Reading:
        """Parse <function=name>...</function>. `anyone`: also accept a name that is not a tool's."""
        name: list[str] = []
        while (character := (yield from self._next())) and character not in '"<>\n':
            name.append(character)
        tool = "".join(name)
        if not character or character not in '">' or not (anyone or tool in self._parameters):
            self._give_up(before + tool + character)
            return
        while character == '"' and (character := (yield from self._next())) not in ("", ">"):
            character = '"'
        body: list[str] = []
        end = ""
        while character := (yield from self._next()):
            if character in ENDS_XML.first and (end := (yield from self._word(character, ENDS_XML))):
                break
            body.append(character)
        if end not in XML.values():
            self._unread(end)
        text = "".join(body)
        arguments = xml_arguments(text, self._parameters.get(tool, {})) if end else None
        self._add(_Call(self._count), tool, arguments, text.strip())
        yield from self._closed("call")

    def _named(self, character: str) -> Reading:
        """Parse a call that begins with the tool's name."""
        characters: list[str] = []
        name = ""
        while character and character not in "([{<\n":
            characters.append(character)
            character = yield from self._next()
        name = _bare_name("".join(characters), self._parameters)
        in_fence = False
        while True:
            if character == "(":
                yield from self._python(characters, name, marked=True)
                return
            if character == "{" and name:
                yield from self._arguments(name)
                return
            mark = (yield from self._word(character, AFTER_NAME)) if character in AFTER_NAME.first else ""
            if mark in NAME_FOLLOWS and (name == "function" or mark == "<|tool_call:name|>"):
                yield from self._named((yield from self._next()))
                return
            if mark in TAGGED:
                yield from self._tagged(name, mark)
                return
            if mark == "[CALL_ID]":
                while (character := (yield from self._next())).isalnum():
                    pass
                continue
            if mark in CLOSING.whole or not character:
                arguments: dict[str, Any] | None = {} if mark and name in self._parameters else None
                self._unread(mark or character)
                source = "" if arguments is not None else "".join(characters).strip()
                self._add(_Call(self._count), name if arguments is not None else "", arguments, source, _FORM)
                yield from self._closed("call")
                return
            if not mark and character == "`" and not in_fence and (yield from self._word(character, FENCE)):
                yield from self._label()
                in_fence = True
            elif not mark and character not in SPACE:
                self._unread(character)
                yield from self._unreadable(characters, _FORM)
                return
            if character == "\n" and name not in self._parameters and not in_fence:
                self._unread(character)
                yield from self._unreadable(characters, _FORM)
                return
            character = yield from self._next()

    def _arguments(self, name: str) -> Reading:
        """Parse a JSON object of arguments whose "{" was read."""
        scan, call = JsonText(arguments=True), _Call(self._count)
        scan.push("{")
        self._stream(scan, call, name)
        while not scan.done and (character := (yield from self._next())):
            if character == "<" and not scan.quoted and (mark := (yield from self._word(character, CLOSING))):
                self._unread(mark)
                break
            scan.push(character)
            self._stream(scan, call, name)
        scan.finish()
        self._add(call, name, loads("".join(scan.text)) if scan.done else None, "".join(call.said))
        yield from self._closed("call")

    def _tagged(self, name: str, mark: str) -> Reading:
        """Parse GLM's <arg_key>key</arg_key><arg_value>value</arg_value>..., up to the end mark."""
        body = [mark]
        end = ""
        while character := (yield from self._next()):
            if character in CLOSING.first and (end := (yield from self._word(character, CLOSING))):
                break
            body.append(character)
        self._unread(end)
        text = "".join(body)
        arguments = tagged_arguments(text, self._parameters.get(name, {})) if end else None
        self._add(_Call(self._count), name, arguments, text.strip())
        yield from self._closed("call")

    def _python_unmarked(self, before: str) -> Reading:
        """Parse a call in Python notation without a mark; `before` ends with the first character of its name."""
        name = before[-1]
        while any(tool.startswith(name) for tool in self._parameters):
            character = yield from self._next()
            if character == "(" and name in self._parameters:
                yield from self._python([before + name[1:]], name, marked=False)
                return
            name += character
            if not character:
                break
        self._give_up(before + name[1:])

    def _python(self, before: list[str], name: str, marked: bool) -> Reading:
        """Parse a call in Python whose "(" was read."""
        scan: list[str] = []
        quote, escaped, depth = "", False, 1
        while depth and (character := (yield from self._next())):
            if escaped:
                escaped = False
            elif quote:
                escaped = character == "\\"
                quote = "" if character == quote else quote
            elif character in "\"'":
                quote = character
            elif character == "<" and (mark := (yield from self._word(character, CLOSING))):
                self._unread(mark)
                break
            else:
                depth += (character in "([{") - (character in ")]}")
            scan.append(character)
        source = "".join(scan)
        arguments = None if depth else python_arguments(source[:-1], self._parameters.get(name, {}))
        if arguments is None and not marked:
            self._say("".join([*before, "(", source]))
            self._after = None
            return
        call_text = "".join([*before, "(", source]).strip()
        self._add(_Call(self._count), name if arguments is not None else "", arguments, call_text, _FORM)
        yield from self._closed("python")


_CUT = "the arguments are not a JSON object; they may have been cut off by max_tokens"
_FORM = 'a call is {"name": ..., "arguments": {...}}'


def _bare_name(text: str, tools: Mapping[str, Any]) -> str:
    """The tool's name without additions that some models make: functions.name:0, name.call, call:name."""
    name = text.strip()
    if name in tools:
        return name
    bare = name.removeprefix("functions.").removeprefix("call:").removesuffix(".call").rstrip(string.digits)
    return bare.removesuffix(":") if bare.removesuffix(":") in tools else name


def _calls_in(
    value: Any, tools: Mapping[str, Any] | Sequence[str]
) -> tuple[list[tuple[str, dict[str, Any] | None]], str]:
    """The calls in a JSON value: (name, arguments) each, arguments None if invalid; and an error message.

    Args:
        tools: names that may also be an object's only key, with the arguments as its value.
    """
    if not isinstance(value, Mapping):
        return [], "the call is not a JSON object; it may have been cut off by max_tokens"
    if isinstance(value.get("tool_calls"), list):
        inner_calls = [_calls_in(inner, ()) for inner in value["tool_calls"]]
        return [call for calls, _ in inner_calls for call in calls], next(
            (error for _, error in inner_calls if error), _FORM
        )
    if isinstance(value.get("function"), Mapping):  # OpenAI's notation
        value = value["function"]
    name = next((value[key] for key in _NAME_KEYS if key in value), None)
    key = next((key for key in _ARGUMENT_KEYS if key in value), None)
    if len(value) == 1 and (only := next(iter(value))) in tools:
        name, key = only, only
    if not isinstance(name, str) or not name or key is None:
        return [], _FORM
    arguments = value[key]
    if isinstance(arguments, str):
        arguments = loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return [(name, None)], f"the arguments of {name!r} are not a JSON object"
    return [(name, arguments)], ""
