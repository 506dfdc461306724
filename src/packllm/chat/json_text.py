"""Parses JSON as models write it, including common errors."""

from __future__ import annotations

import json
from typing import Any

SPACE = " \t\r\n"
_WORDS = {"True": "true", "False": "false", "None": "null"}
_HEAD = 7  # tokens up to the arguments of a call: "name" : "..." , "arguments" : {


def loads(text: str) -> Any:
    """Parse JSON; None if it is invalid or contains no valid Unicode. As in json.loads, numbers too large for a float
    become infinite."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # fails on lone surrogates
    except (ValueError, RecursionError):
        return None
    return value


def tolerant_loads(text: str) -> Any:
    """As loads, for one object or array, with the corrections of JsonText."""
    scan = JsonText()
    for character in text.strip():
        if scan.done:
            return None
        scan.push(character)
    return loads("".join(scan.text)) if scan.done else None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


class JsonText:
    """An object that is parsed one character at a time. It corrects single quotes, Python's words (True, None), raw
    line breaks in strings, invalid escapes and trailing commas.

    Args:
        arguments: the object is the arguments of a call, not a call that contains them.

    Attributes:
        raw: the characters read.
        text: pieces of correct JSON, in order; pieces that may need a correction are held back.
        done: whether the object is complete.
        head: the first tokens at the object's top level: strings in double quotes, otherwise single characters.
        string: the top-level string that is being read, so far; None outside of one.
        arguments_at, arguments_end: indices in `text` where the arguments begin and end, if a name precedes them.
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
        """Whether the last character is inside a string."""
        return bool(self._quote)

    @property
    def string(self) -> str | None:
        if not self._quote or self._depth != 1:
            return None
        return "".join(self.text[self._string_at + 1 :])

    @property
    def name(self) -> str:
        """The name before the arguments."""
        return loads(self.head[2])

    def push(self, character: str) -> None:
        """Read one character."""
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
        """End the text."""
        self._flush_word()

    def _between(self, character: str) -> None:
        if character in SPACE:
            (self._gap if self._gap else self.text).append(character)
            return
        if character in "}]" and self._gap:  # a trailing comma
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
