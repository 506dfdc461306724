"""The fewest characters that a text lacks to match a pattern, whatever it begins with.

A small automaton (Thompson 1968) of a regular expression as JSON schema has it: searched for, unless ^ and $ say
otherwise. It only proposes: the grammar has the last word, so that what it does not know (lookaround, references back)
may be left out, and a flavour of regular expressions that differs in a corner does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

_MOST_STATES = 5000
_OFTEN = 256  # more repetitions than this are taken for endless, once there are as many as there must be
_LIKELY = "a0A-_. @/:,1bB" + "".join(map(chr, range(0x20, 0x7F)))  # characters to write, the first that fit
_CATEGORIES = {
    sre.CATEGORY_DIGIT: "[0-9]",
    sre.CATEGORY_NOT_DIGIT: "[^0-9]",
    sre.CATEGORY_WORD: "[A-Za-z0-9_]",
    sre.CATEGORY_NOT_WORD: "[^A-Za-z0-9_]",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
}

Takes = Callable[[str], bool]


@lru_cache(256)
def lacking(pattern: str, text: str) -> str | None:
    """The shortest text that makes `text` match the pattern; None if there is none, or the pattern is not known."""
    automaton = _automaton(pattern)
    return None if automaton is None else automaton.lacking(text)


@lru_cache(256)
def _automaton(pattern: str) -> _Automaton | None:
    try:
        return _Automaton(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError, _Unknown):
        return None


class _Unknown(Exception):
    """A part that no finite automaton has, or too many states."""


class _Automaton:
    """States are numbers; from each go empty steps, and steps that take a character and write one."""

    def __init__(self, tree: Any) -> None:
        self.empty: list[list[int]] = []
        self.steps: list[list[tuple[Takes, str | None, int]]] = []
        parts = list(tree)
        begins = bool(parts) and parts[0] == (sre.AT, sre.AT_BEGINNING)
        ends = bool(parts) and parts[-1] == (sre.AT, sre.AT_END)
        self.start = self._state()
        if not begins:
            self._step(self.start, lambda _: True, "a", self.start)
        self.end = self._all(parts, self.start)
        if not ends:
            self._step(self.end, lambda _: True, "a", self.end)
        self._nearest = self._distances()

    def lacking(self, text: str) -> str | None:
        states = self._reached({self.start})
        for letter in text:
            states = self._reached({to for s in states for takes, _, to in self.steps[s] if takes(letter)})
        near = [self._nearest[s] for s in states if s in self._nearest]
        return min(near, key=len) if near else None

    def _distances(self) -> dict[int, str]:
        """The shortest text from each state to the end."""
        found = {self.end: ""}
        empty: dict[int, list[int]] = {}
        written: dict[int, list[tuple[str, int]]] = {}
        for state, (nexts, steps) in enumerate(zip(self.empty, self.steps, strict=True)):
            for to in nexts:
                empty.setdefault(to, []).append(state)
            for _, letter, to in steps:
                if letter is not None:
                    written.setdefault(to, []).append((letter, state))
        level = [self.end]
        while level:
            for state in level:  # grows: those an empty step away are as near
                for before in empty.get(state, ()):
                    if before not in found:
                        found[before] = found[state]
                        level.append(before)
            further = []
            for state in level:
                for letter, before in written.get(state, ()):
                    if before not in found:
                        found[before] = letter + found[state]
                        further.append(before)
            level = further
        return found

    def _reached(self, states: set[int]) -> set[int]:
        left = list(states)
        while left:
            for to in self.empty[left.pop()]:
                if to not in states:
                    states.add(to)
                    left.append(to)
        return states

    def _state(self) -> int:
        if len(self.empty) >= _MOST_STATES:
            raise _Unknown
        self.empty.append([])
        self.steps.append([])
        return len(self.empty) - 1

    def _step(self, state: int, takes: Takes, letter: str | None, to: int) -> None:
        self.steps[state].append((takes, letter, to))

    def _all(self, parts: Any, state: int) -> int:
        for part in parts:
            state = self._part(part, state)
        return state

    def _part(self, part: tuple[Any, Any], state: int) -> int:
        """Where one part of the pattern leads to from a state."""
        kind, value = part
        if kind is sre.AT:
            return state
        if kind is sre.SUBPATTERN:
            return self._all(value[-1], state)
        if kind is sre.BRANCH:
            end = self._state()
            for branch in value[1]:
                self.empty[self._all(branch, state)].append(end)
            return end
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            least, most, body = value
            for _ in range(least):
                state = self._all(body, state)
            if most is sre.MAXREPEAT or most - least > _OFTEN:
                around = self._state()
                self.empty[state].append(around)
                self.empty[self._all(body, around)].append(around)
                return around
            end = self._state()
            self.empty[state].append(end)
            for _ in range(most - least):
                state = self._all(body, state)
                self.empty[state].append(end)
            return end
        takes = _takes(kind, value)
        end = self._state()
        written = chr(value) if kind is sre.LITERAL else next((letter for letter in _LIKELY if takes(letter)), None)
        self._step(state, takes, written, end)
        return end


def _takes(kind: Any, value: Any) -> Takes:
    if kind is sre.LITERAL:
        return lambda letter: ord(letter) == value
    if kind is sre.NOT_LITERAL:
        return lambda letter: ord(letter) != value
    if kind is sre.ANY:
        return lambda letter: letter != "\n"
    if kind is sre.IN:
        pattern = re.compile(_class(value))
        return lambda letter: pattern.fullmatch(letter) is not None
    raise _Unknown


def _class(members: Any) -> str:
    """A class of characters, spelled again."""
    negated = members[0][0] is sre.NEGATE
    kinds = []
    for kind, value in members[negated:]:
        if kind is sre.LITERAL:
            kinds.append(re.escape(chr(value)))
        elif kind is sre.RANGE:
            kinds.append(f"[{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}]")
        elif kind is sre.CATEGORY and value in _CATEGORIES:
            kinds.append(_CATEGORIES[value])
        else:
            raise _Unknown
    return f"(?!{'|'.join(kinds)})(?s:.)" if negated else f"(?:{'|'.join(kinds)})"
