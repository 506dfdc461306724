"""Strings that know where each of their characters is from, after all operations of a chat template.

A template joins, cuts, trims and splits strings, and compares them. It is rendered with the real contents, and every
string in it is a Traced one. Its value is the usual one; its runs say which characters the template wrote itself, which
are from a content (and from which part of it), and which are of unknown source. Only what the template wrote may be a
control token. The result of an operation that is not traced has unknown source: so it is not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, SupportsIndex

from markupsafe import Markup

TEMPLATE = -1  # source of the template's own text
UNKNOWN = -2  # unknown source: untrusted text
ASTRAY = -1  # start of a run whose text differs from its source

Run = tuple[int, int, int]  # length, source, start in the source


class Traced(str):
    """A string with its runs, in order. Without runs its source is unknown."""

    _runs: tuple[Run, ...]

    def __new__(cls, text: str = "", runs: Iterable[Run] | None = None) -> Traced:
        self = super().__new__(cls, text)
        self._runs = ((len(self), UNKNOWN, 0),) if runs is None else _merged(runs)
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, str) or isinstance(other, Markup):  # Markup escapes the other operand
            return NotImplemented
        return joined((self, other))

    def __radd__(self, other: Any) -> Any:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Traced:
        text = str.__mul__(self, times)
        return Traced(text, self._runs * times.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Traced:
        text = str.__mod__(self, values)
        values = values if isinstance(values, tuple) else (values,)
        if trusted(self) and all(map(trusted, values)):
            return own(text)
        marks = list(re.finditer(r"%[%s]", self))
        if str.count(self, "%") != sum(len(mark[0].replace("%s", "%")) for mark in marks):
            return Traced(text)
        parts, at, rest = [], 0, iter(values)
        for mark in marks:
            parts += [self[at : mark.start()], self[mark.start()] if mark[0] == "%%" else shown(next(rest))]
            at = mark.end()
        return _checked(text, [*parts, self[at:]])

    def __getitem__(self, key: SupportsIndex | slice) -> Traced:
        text = str.__getitem__(self, key)
        if not isinstance(key, slice):
            at = key.__index__() % len(self)
            return Traced(text, _cut(self._runs, at, at + 1))
        start, stop, step = key.indices(len(self))
        if step == 1:
            return Traced(text, _cut(self._runs, start, stop))
        return own(text) if trusted(self) else Traced(text)

    def __iter__(self) -> Iterator[str]:
        return (self[at] for at in range(len(self)))

    # Methods that remove a part

    def strip(self, chars: str | None = None) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Traced:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> Traced:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> Traced:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> Traced:
        return self[: len(str.removesuffix(self, suffix))]

    # Methods that split

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        with_ends = self._located(str.splitlines(self, True), "")
        return (
            with_ends
            if keepends
            else [line[: len(without_end)] for line, without_end in zip(with_ends, str.splitlines(self), strict=True)]
        )

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return tuple(self._located(list(str.partition(self, sep)), ""))  # type: ignore[return-value]

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return tuple(self._located(list(str.rpartition(self, sep)), ""))  # type: ignore[return-value]

    def _located(self, parts: list[str], between: str | None) -> list[str]:
        """The parts with their runs. `between`: the separator; None: white space of any length."""
        located: list[str] = []
        at = 0
        for part in parts:
            if between is None:
                at = str.index(self, part, at)
            located.append(self[at : at + len(part)])
            at += len(part) + len(between or "")
        return located

    # Methods that change characters

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Traced:
        text = str.replace(self, old, new, count)
        if not old:
            return own(text) if trusted(self) and trusted(new) else Traced(text)
        return shown(new).join(self.split(old, count))

    def join(self, parts: Iterable[str], /) -> Traced:
        between: list[str] = []
        for part in parts:
            between += [self, part]
        str.join("", between)  # raises TypeError if an item is no string
        return joined(between[1:])

    def lower(self) -> Traced:
        return self._changed(str.lower)

    def upper(self) -> Traced:
        return self._changed(str.upper)

    def casefold(self) -> Traced:
        return self._changed(str.casefold)

    def capitalize(self) -> Traced:
        return self._changed(str.capitalize)

    def title(self) -> Traced:
        return self._changed(str.title)

    def swapcase(self) -> Traced:
        return self._changed(str.swapcase)

    def _changed(self, change: Callable[[str], str]) -> Traced:
        """Letters that do not change keep their place; of the others only the source is known."""
        text = change(self)
        if text == self or trusted(self):
            return Traced(text, self._runs) if text == self else own(text)
        if len(text) != len(self):
            return Traced(text, [(len(text), max(source for _, source, _ in self._runs), ASTRAY)])
        runs: list[Run] = []
        at = 0
        for length, source, start in self._runs:
            for i in range(at, at + length):
                same = text[i] == str.__getitem__(self, i) or source < 0 or start == ASTRAY
                runs.append((1, source, (start + i - at if start != ASTRAY else ASTRAY) if same else ASTRAY))
            at += length
        return Traced(text, runs)

    def center(self, width: SupportsIndex, fill: str = " ", /) -> Traced:
        return self._padded(str.center(self, width, fill), fill)

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> Traced:
        return self._padded(str.ljust(self, width, fill), fill)

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> Traced:
        return self._padded(str.rjust(self, width, fill), fill)

    def _padded(self, text: str, fill: str) -> Traced:
        return own(text) if trusted(self) and trusted(fill) else Traced(text)


def own(text: str) -> Traced:
    """Text of the template itself."""
    return Traced(text, ((len(text), TEMPLATE, 0),))


def content(text: str, source: int) -> Traced:
    """A text of the template's input, with number `source`."""
    return Traced(text, ((len(text), source, 0),))


def runs_of(text: str) -> tuple[Run, ...]:
    return text._runs if isinstance(text, Traced) else ((len(text), UNKNOWN, 0),)


def trusted(value: Any) -> bool:
    """Whether the template wrote all of it. A number counts as trusted, None too."""
    if isinstance(value, Traced):
        return all(source == TEMPLATE for _, source, _ in value._runs)
    return value is None or isinstance(value, int | float)


def shown(value: Any) -> Traced:
    """A value as a template prints it."""
    text = str(value)
    if isinstance(text, Traced):
        return text
    return own(text) if trusted(value) else Traced(text)


def joined(parts: Iterable[str]) -> Traced:
    """The parts, joined, with their runs."""
    parts = list(parts)
    return Traced(str.join("", parts), (run for part in parts for run in runs_of(part)))


def formatted(form: Traced, field: Callable[[str], Any], whole: Callable[[], str]) -> Traced:
    """`form.format(...)`: `field` gives the value of a field, `whole` Python's own result."""
    write = own if trusted(form) else Traced
    parts: list[str] = []
    number = 0
    for literal, name, spec, conversion in Formatter().parse(form):
        parts.append(write(literal))
        if name is None:
            continue
        if spec or conversion:
            return Traced(whole())
        if name[:1] in ("", ".", "["):
            name, number = f"{number}{name}", number + 1
        parts.append(shown(field(name)))
    return _checked(whole(), parts)


def placed(text: str, leaves: Iterable[tuple[Traced, str]]) -> Traced:
    """`text` with the runs of the strings in it; each comes with its spelling in the text, in order of occurrence."""
    parts: list[str] = []
    at = 0
    for leaf, spelling in leaves:
        start = text.find(spelling, at)
        if start < 0:
            continue
        source = next((source for _, source, _ in leaf._runs if source >= 0), UNKNOWN)
        traced = Traced(spelling, leaf._runs if spelling == leaf else [(len(spelling), source, ASTRAY)])
        # Quoted text is never a control token, even if the template wrote it.
        runs = [(n, UNKNOWN if origin == TEMPLATE else origin, begin) for n, origin, begin in traced._runs]
        parts += [text[at:start], Traced(spelling, runs)]
        at = start + len(spelling)
    return joined([*parts, text[at:]])


def leaves(value: Any) -> Iterator[Traced]:
    """The traced strings in a value, in the order in which JSON contains them."""
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(key)
            yield from leaves(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for inner in value:
            yield from leaves(inner)


def _checked(text: str, parts: Sequence[str]) -> Traced:
    result = joined(parts)
    return result if result == text else Traced(text)


def _merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    results: list[Run] = []
    for run in runs:
        length, source, start = run
        if not length:
            continue
        if results:
            previous_length, previous_source, previous_start = results[-1]
            follows = (
                source < 0
                or (start == previous_start == ASTRAY)
                or (previous_start != ASTRAY and start == previous_start + previous_length)
            )
            if source == previous_source and follows:
                results[-1] = previous_length + length, source, previous_start
                continue
        results.append(run)
    return tuple(results)


def _cut(runs: Sequence[Run], start: int, stop: int) -> Iterator[Run]:
    at = 0
    for length, source, begin in runs:
        if at >= stop:
            return
        low, high = max(start, at), min(stop, at + length)
        if low < high:
            yield high - low, source, begin if begin == ASTRAY else begin + low - at
        at += length
