"""The shortest way that a grammar leaves to the end of an answer, in bytes, and in tokens of a vocabulary.

The grammar is llguidance's, which tells of a place only which bytes may follow. So the way is searched, the cheapest
first, over copies of the matcher. Places that look alike (the same bytes may follow, in the same brackets after as
many items, as far into a value) count as the same; a few of each are followed. What is found is always a whole
answer; that it is the shortest holds where places that look alike are alike, as they are in all JSON whose values do
not decide what follows them.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from packllm.decode.matcher import Matcher
from packllm.decode.patterns import lacking


@dataclass(frozen=True)
class Hints:
    """What is known of a grammar beside what its matcher tells of the next byte.

    Attributes:
        names: required properties of its objects.
        patterns: of its strings.
    """

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    def pieces(self, place: Place) -> Iterator[bytes]:
        """Texts that may end the string at this place, or the key that it is."""
        string = place.string
        if string == "" and place.stack:
            for name in self.names:
                yield json.dumps(name, ensure_ascii=False)[1:].encode() + b": "
        if string is not None:
            for pattern in self.patterns:
                rest = lacking(pattern, string)
                if rest is not None:
                    yield json.dumps(rest, ensure_ascii=False)[1:].encode()


EMPTY: Mapping[int, bytes] = MappingProxyType({})

_ALIKE = 3  # places that look alike, followed at most
_MOST_PLACES = (6000, 4000)  # that a search visits: one that goes straight, and one by length
_MOST_BYTES = 64  # of so many different next bytes all are tried, of more all but most letters and digits
_LONGER = 1000  # cost of going on with what could end
_LONGEST_PIECE = 24  # bytes of a token that are looked for in a way

_QUOTE, _COMMA, _CLOSERS = 0x22, 0x2C, [0x7D, 0x5D]
_STRUCTURE = frozenset(b",}]")
_MARKS = bytes(byte for byte in range(0x21, 0x7F) if not chr(byte).isalnum() and byte != 0x5C)
_KINDS = [b'"' + _MARKS, b"abcdefghijklmnopqrstuvwxyz", b"0123456789", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
_PREFERRED = {byte: rank for rank, byte in enumerate(dict.fromkeys(b"".join([b'"', *_KINDS[1:], bytes(range(256))])))}


class Place(NamedTuple):
    """Where in JSON a text ends.

    Attributes:
        stack: the open brackets, each with the items before the last comma in it.
        leaf: the value or key so far, if it is no bracket.
        quoted, escaped: whether within a string, and right after a backslash in it.
    """

    stack: tuple[tuple[int, int], ...] = ()
    leaf: bytes = b""
    quoted: bool = False
    escaped: bool = False

    def after(self, text: bytes) -> Place:
        """The place after more text."""
        place = self
        for byte in text:
            place = place._step(byte)
        return place

    def _step(self, byte: int) -> Place:
        longer = self.leaf + bytes([byte])
        if self.quoted:
            return Place(self.stack, longer, self.escaped or byte != _QUOTE, byte == 0x5C and not self.escaped)
        if byte == _QUOTE:
            return Place(self.stack, longer, True)
        if byte in b"{[":
            return Place((*self.stack, (byte, 0)))
        if byte in b"}]":
            return Place(self.stack[:-1])
        if byte == _COMMA and self.stack:
            bracket, items = self.stack[-1]
            return Place((*self.stack[:-1], (bracket, items + 1)))
        return Place(self.stack, b"" if byte in b": ,\n" else longer)

    @property
    def looks(self) -> tuple:
        """What of it matters for what follows, as far as it can be told."""
        return self.stack, len(self.leaf), self.quoted, self.escaped

    @property
    def string(self) -> str | None:
        """The string so far, if it is within one and not in the middle of a character."""
        try:
            return json.loads(self.leaf + b'"', strict=False) if self.quoted and not self.escaped else None
        except ValueError:
            return None


class Way:
    """Bytes that lead to an end, and the fewest tokens that spell what is left of them from each place on.

    Args:
        text: the bytes.
        ids: of a vocabulary's text tokens, by their bytes.
        need: tokens from each place on, where they are known: of the last places.
    """

    def __init__(self, text: bytes, ids: Mapping[bytes, int], need: Sequence[int] = (0,)) -> None:
        self.text, self._ids = text, ids
        backwards = list(reversed(need))
        for at in range(len(text) - len(need), -1, -1):
            longest = min(_LONGEST_PIECE, len(text) - at)
            pieces = (1 + backwards[-n] for n in range(1, longest + 1) if text[at : at + n] in ids)
            backwards.append(min(pieces, default=len(text) + 1))
        self._need = backwards[::-1]

    @property
    def tokens(self) -> int:
        """Tokens that it takes."""
        return self._need[0]

    def after(self, size: int) -> Way:
        """What is left of it after so many bytes."""
        return Way(self.text[size:], self._ids, self._need[size:])

    def first(self) -> int:
        """The token that it begins with, of the longest that leave the fewest."""
        sizes = [n for n in range(1, min(_LONGEST_PIECE, len(self.text)) + 1) if self.text[:n] in self._ids]
        return self._ids[self.text[: min(sizes, key=lambda n: (self._need[n], -n))]]


def shortest(
    matcher: Matcher, place: Place, spelled: np.ndarray, hints: Hints, tails: Mapping[int, bytes] = EMPTY
) -> bytes | None:
    """The shortest text from here to an end; None if none is found.

    Args:
        matcher: over bytes; it stays where it is.
        place: where the text so far ends.
        spelled: bool (256,): the bytes that can be written.
        hints: of the grammar.
        tails: by number of open brackets: what may follow the end of a value there, known from before.
    """
    # First by length. A long way, which would have all shorter ones tried before it, is then gone straight.
    for weight in (1, 0):
        most = _MOST_PLACES[weight] // (6 if tails else 1)  # a token that leads too far is not worth more
        found = _search(matcher, place, spelled, hints, tails, weight, most)
        if found is not None:
            return found
    return None


def _search(
    matcher: Matcher,
    place: Place,
    spelled: np.ndarray,
    hints: Hints,
    tails: Mapping[int, bytes],
    weight: int,
    most: int,
) -> bytes | None:
    order = count()
    alike: Counter[tuple] = Counter()
    # (cost, of equal cost the longest if lengths do not count, then the first, text so far,
    #  matcher before the text's last piece or None at the end, that piece, place after it)
    heap: list[tuple[int, int, int, bytes, Matcher | None, bytes, Place]] = [(0, 0, 0, b"", matcher, b"", place)]

    def push(cost: int, text: bytes, matcher: Matcher | None, piece: bytes, place: Place) -> None:
        heapq.heappush(heap, (cost, (weight - 1) * len(text), next(order), text, matcher, piece, place))

    hinted = 6 if place.escaped else 0  # bytes: where the hints are asked for again
    common = max(map(len, tails.values()), default=0)  # to come in any case, so that it tells no place from another
    for _ in range(most):
        if not heap:
            return None
        cost, _, _, text, at, piece, place = heapq.heappop(heap)
        if at is None:
            return text
        at = at.fork()
        at.consume(piece)
        tail = None if place.quoted else tails.get(len(place.stack))
        if tail is not None and at.ends_by(tail):
            push(cost + weight * (len(tail) - common), text + tail, None, b"", place)
            continue
        piece = at.forced()
        if piece:
            if not spelled[list(piece)].all():
                continue
            at.consume(piece)
            text, place, cost = text + piece, place.after(piece), cost + weight * len(piece)
        mask = at.mask()
        looks = mask.tobytes(), place.looks
        alike[looks] += 1
        if alike[looks] > _ALIKE:
            continue
        if mask[-1]:
            push(cost, text, None, b"", place)
        closers = mask[_CLOSERS].any()
        endable = bool(mask[-1] or (mask[_QUOTE] if place.quoted else closers or mask[_COMMA]))
        tried = [bytes([byte]) for byte in _tried(np.flatnonzero(mask[:-1] & spelled))]
        if place.quoted and not endable and (place.leaf == b'"' or len(text) <= hinted):
            tried += [piece for piece in hints.pieces(place) if at.follows(piece)]
        for piece in tried:
            ends = b'"' in piece if place.quoted else piece in b"}]" or (piece == b"," and not closers)
            more = weight * len(piece) + _LONGER * (endable and not ends) + (0 if weight else 10 * (piece in b"{["))
            push(cost + more, text + piece, at, piece, place.after(piece))
    return None


def _tried(allowed: np.ndarray) -> list[int]:
    """The next bytes to try: all, or if they are many, of letters and digits some."""
    if len(allowed) > _MOST_BYTES:
        there = set(allowed.tolist())
        marks, *kinds = ([byte for byte in kind if byte in there] for kind in _KINDS)
        allowed = np.array([*marks, *(byte for kind in kinds for byte in kind[:2] + kind[2:][-1:])])
    return sorted(allowed.tolist(), key=_PREFERRED.__getitem__)


def tails_of(way: bytes, place: Place) -> dict[int, bytes]:
    """For each number of open brackets: the way from where a value has ended there, as `way` from `place` passes it."""
    tails: dict[int, bytes] = {}
    for at, byte in enumerate(way):
        depth = len(place.stack)
        if not place.quoted and byte in _STRUCTURE and depth not in tails:
            tails[depth] = way[at:]
        place = place.after(way[at : at + 1])
    tails.setdefault(len(place.stack), b"")
    return tails


def spelled_bytes(ids: Mapping[bytes, int]) -> np.ndarray:
    """bool (256,): which bytes are tokens by themselves."""
    return np.array([bytes([byte]) in ids for byte in range(256)])
