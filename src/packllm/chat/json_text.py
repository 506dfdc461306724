"""JSON as models write it: most of it is JSON, some is nearly so."""

from __future__ import annotations

import json
from typing import Any

SPACE = " \t\r\n"
_WORDS = {"True": "true", "False": "false", "None": "null"}
_HEAD = 7  # tokens up to the arguments of a call: "name" : "..." , "arguments" : {


def loads(text: str) -> Any:
    """JSON as a value; None for what is not JSON of Unicode text. A number beyond a float's range is infinite, as
    json.loads has it."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError):
        return None
    return value


def tolerant_loads(text: str) -> Any:
    """As loads, of one object or array that may be misspelt as JsonText mends it."""
    scan = JsonText()
    for character in text.strip():
        if scan.done:
            return None
        scan.push(character)
    return loads("".join(scan.text)) if scan.done else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


class JsonText:
    """An object that is read one character at a time, and mended where it is nearly JSON: single quotes, Python's
    words, raw line breaks in strings, backslashes that escape nothing, a comma too many.

    Args:
        arguments: the object is the arguments themselves, not a call that holds them.

    Attributes:
        raw: the characters read.
        text: pieces of JSON, in order; what may have to be mended is held back.
        done: the object is whole.
        head: the first tokens directly in the object: strings in double quotes, else single characters.
        string: the string directly in the object that is being read, as far as it is; None between strings.
        arguments_at, arguments_end: where in `text` the arguments begin and end, if a name comes before them.
    """

    def __init__(self, arguments: bool = False) -> None:
        self.raw: list[str] = []
        self.text: list[str] = []
        self.done = False
        self.head: list[str] = []
        self.arguments_at: int | None = 0 if arguments else None
        self.arguments_end: int | None = None
        self._depth = 0
        self._around_arguments = 0 if arguments else 1
        self._quote, self._escaped = "", False
        self._word = ""
        self._gap: list[str] = []  # a comma, and white space after it
        self._string_at = 0

    @property
    def quoted(self) -> bool:
        """Whether it is inside a string."""
        return bool(self._quote)

    @property
    def string(self) -> str | None:
        if not self._quote or self._depth != 1:
            return None
        return "".join(self.text[self._string_at + 1 :])

    @property
    def name(self) -> str:
        """The name that comes before the arguments."""
        return loads(self.head[2])

    def push(self, character: str) -> None:
        """Read one more character."""
        self.raw.append(character)
        if self._quote:
            self._in_string(character)
        elif character.isalnum() or character == "_":
            self._flush_gap()
            self._word += character
            self._note(character)
        else:
            self._flush_word()
            self._between(character)

    def finish(self) -> None:
        """No more characters come."""
        self._flush_word()

    def _between(self, character: str) -> None:
        if character in SPACE:
            (self._gap if self._gap else self.text).append(character)
            return
        if character in "}]" and self._gap:  # a comma too many
            self.text += self._gap[1:]
            self._gap = []
        self._flush_gap()
        if character == ",":
            self._note(character)
            self._gap.append(character)
            return
        if character in "\"'":
            self._quote, self._string_at = character, len(self.text)
            self.text.append('"')
            return
        if character in "{[":
            if character == "{" and self._depth == 1 and self._before_arguments():
                self.arguments_at = len(self.text)
            self._note(character)
            self._depth += 1
        else:
            self._note(character)
        self.text.append(character)
        if character in "}]":
            self._depth -= 1
            if self._depth == self._around_arguments and self.arguments_at is not None and self.arguments_end is None:
                self.arguments_end = len(self.text)
            self.done = self._depth <= 0

    def _in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
            if character == "'":
                self.text.append("'")
            elif character in '"\\/bfnrtu':
                self.text.append("\\" + character)
            else:
                self.text.append("\\\\" + _escaped(character))
        elif character == "\\":
            self._escaped = True
        elif character == self._quote:
            self._quote = ""
            self.text.append('"')
            if self._depth == 1 and len(self.head) < _HEAD:
                self.head.append("".join(self.text[self._string_at :]))
        else:
            self.text.append('\\"' if character == '"' else _escaped(character))

    def _note(self, character: str) -> None:
        if self._depth == 1 and len(self.head) < _HEAD:
            self.head.append(character)

    def _before_arguments(self) -> bool:
        head = self.head
        return (
            len(head) == _HEAD - 1
            and [head[0], head[1], head[3], head[5]] == ['"name"', ":", ",", ":"]
            and head[2][0] == '"'
            and bool(loads(head[2]))
            and head[4] in ('"arguments"', '"parameters"')
        )

    def _flush_gap(self) -> None:
        self.text += self._gap
        self._gap = []

    def _flush_word(self) -> None:
        if self._word:
            self.text.append(_WORDS.get(self._word, self._word))
            self._word = ""


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1] if character < " " else character
