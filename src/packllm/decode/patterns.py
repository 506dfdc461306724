"""The shortest text that completes a given one to match a regular expression.

The regular expression becomes a small automaton (Thompson 1968). As in JSON schema it is searched for unless ^ and $
anchor it. The automaton only proposes a text, and the grammar decides. So it may leave out lookaround and
backreferences, and small differences between dialects of regular expressions do no harm.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

_MOST_STATES = 5000
_OFTEN = 256  # more optional repetitions than this count as unlimited
_LIKELY = "a0A-_. @/:,1bB" + "".join(map(chr, range(0x20, 0x7F)))  # characters to write; the first that fits is used
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
    """The shortest text that makes `text` match the pattern; None if there is none or the pattern is unsupported."""
    automaton = _automaton(pattern)
    return None if automaton is None else automaton.lacking(text)


@lru_cache(256)
def _automaton(pattern: str) -> _Automaton | None:
    try:
        return _Automaton(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError, _Unknown):
        return None


class _Unknown(Exception):
    """A part that no finite automaton can express, or too many states."""


class _Automaton:
    """A nondeterministic automaton. States are numbers; each has empty steps, and steps over one character (a test
    which characters they take, and one to write)."""

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
        texts = [self._nearest[s] for s in states if s in self._nearest]
        return min(texts, key=len) if texts else None

    def _distances(self) -> dict[int, str]:
        """The shortest text from each state to the end."""
        texts = {self.end: ""}
        empty: dict[int, list[int]] = {}
        letter_steps: dict[int, list[tuple[str, int]]] = {}
        for state, (nexts, steps) in enumerate(zip(self.empty, self.steps, strict=True)):
            for to in nexts:
                empty.setdefault(to, []).append(state)
            for _, letter, to in steps:
                if letter is not None:
                    letter_steps.setdefault(to, []).append((letter, state))
        level = [self.end]
        while level:
            for state in level:  # the list grows: an empty step adds no length
                for before in empty.get(state, ()):
                    if before not in texts:
                        texts[before] = texts[state]
                        level.append(before)
            next_level = []
            for state in level:
                for letter, before in letter_steps.get(state, ()):
                    if before not in texts:
                        texts[before] = letter + texts[state]
                        next_level.append(before)
            level = next_level
        return texts

    def _reached(self, states: set[int]) -> set[int]:
        queue = list(states)
        while queue:
            for to in self.empty[queue.pop()]:
                if to not in states:
                    states.add(to)
                    queue.append(to)
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
        """Add one part of the pattern after a state; return the state after it."""
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
                loop = self._state()
                self.empty[state].append(loop)
                self.empty[self._all(body, loop)].append(loop)
                return loop
            end = self._state()
            self.empty[state].append(end)
            for _ in range(most - least):
                state = self._all(body, state)
                self.empty[state].append(end)
            return end
        takes = _takes(kind, value)
        end = self._state()
        letter = chr(value) if kind is sre.LITERAL else next((letter for letter in _LIKELY if takes(letter)), None)
        self._step(state, takes, letter, end)
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
    """A character class as a pattern for `re`."""
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
