"""The shortest completion that a grammar allows, in bytes, and in tokens of a vocabulary.

llguidance's matcher tells only which bytes may come next. So this module searches over copies of the matcher, the
cheapest completion first. Positions that look alike count as one state: the same next bytes, the same open brackets
with the same number of items, the same length of the current value. Only a few positions of each state are followed.
A result is always a complete answer. It is the shortest one if positions that look alike do allow the same
completions; this is true of all JSON in which no value decides what may follow it.
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
    """Facts about a grammar that its matcher does not tell.

    Attributes:
        names: required properties of its objects.
        patterns: regular expressions of its strings.
    """

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    def pieces(self, place: Place) -> Iterator[bytes]:
        """Texts that may complete the string at this place, or the key that the string is."""
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

_ALIKE = 3  # how many positions of one state are followed, at most
_MOST_PLACES = (6000, 4000)  # positions that a search visits at most: depth first, and by length
_MOST_BYTES = 64  # if more bytes than this may come next, only some letters and digits are tried
_LONGER = 1000  # cost of a continuation where the value or answer could end
_LONGEST_PIECE = 24  # longest token considered, in bytes

_QUOTE, _COMMA, _CLOSERS = 0x22, 0x2C, [0x7D, 0x5D]
_STRUCTURE = frozenset(b",}]")
_MARKS = bytes(byte for byte in range(0x21, 0x7F) if not chr(byte).isalnum() and byte != 0x5C)
_KINDS = [b'"' + _MARKS, b"abcdefghijklmnopqrstuvwxyz", b"0123456789", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
_PREFERRED = {byte: rank for rank, byte in enumerate(dict.fromkeys(b"".join([b'"', *_KINDS[1:], bytes(range(256))])))}


class Place(NamedTuple):
    """The position in JSON where a text ends.

    Attributes:
        stack: the open brackets, each with the number of its commas so far.
        leaf: the current value or key so far, unless it is a bracket.
        quoted: whether the text ends inside a string.
        escaped: whether it ends right after a backslash in a string.
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
        """The parts of the position that matter for what may follow, as far as they are known."""
        return self.stack, len(self.leaf), self.quoted, self.escaped

    @property
    def string(self) -> str | None:
        """The string so far, if the text ends inside one and not in the middle of a character."""
        try:
            return json.loads(self.leaf + b'"', strict=False) if self.quoted and not self.escaped else None
        except ValueError:
            return None


class Way:
    """A completion in bytes, and the fewest tokens that spell its remainder from each offset.

    Args:
        text: the bytes.
        ids: the ids of a vocabulary's text tokens, by their bytes.
        need: fewest tokens from each of the last len(need) offsets, where they are known already.
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
        """The fewest tokens that spell it."""
        return self._need[0]

    def after(self, size: int) -> Way:
        """The remainder after the first `size` bytes."""
        return Way(self.text[size:], self._ids, self._need[size:])

    def first(self) -> int:
        """Its first token: one that leaves the fewest tokens, the longest of those."""
        sizes = [n for n in range(1, min(_LONGEST_PIECE, len(self.text)) + 1) if self.text[:n] in self._ids]
        return self._ids[self.text[: min(sizes, key=lambda n: (self._need[n], -n))]]


def shortest(
    matcher: Matcher, place: Place, spelled: np.ndarray, hints: Hints, tails: Mapping[int, bytes] = EMPTY
) -> bytes | None:
    """The shortest text from `place` to an end; None if the search fails.

    Args:
        matcher: over bytes; it is not changed.
        place: the position where the text so far ends.
        spelled: bool (256,): the bytes that are tokens by themselves.
        hints: of the grammar.
        tails: by number of open brackets: a known completion after the end of a value at that depth.
    """
    # First by length. A long completion would have all shorter ones tried before it: it is then searched depth first.
    for weight in (1, 0):
        most = _MOST_PLACES[weight] // (
            6 if tails else 1
        )  # a search with known tails is one of many, for one token each
        text = _search(matcher, place, spelled, hints, tails, weight, most)
        if text is not None:
            return text
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
    # (cost, order among equal costs: the longest if lengths do not count, then the first; text so far;
    #  matcher before the text's last piece, None at an end; that piece; position after it)
    heap: list[tuple[int, int, int, bytes, Matcher | None, bytes, Place]] = [(0, 0, 0, b"", matcher, b"", place)]

    def push(cost: int, text: bytes, matcher: Matcher | None, piece: bytes, place: Place) -> None:
        heapq.heappush(heap, (cost, (weight - 1) * len(text), next(order), text, matcher, piece, place))

    hinted = 6 if place.escaped else 0  # up to this length in bytes, the hints are used again
    common = max(map(len, tails.values()), default=0)  # every completion costs at least this
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
        pieces = [bytes([byte]) for byte in _tried(np.flatnonzero(mask[:-1] & spelled))]
        if place.quoted and not endable and (place.leaf == b'"' or len(text) <= hinted):
            pieces += [piece for piece in hints.pieces(place) if at.follows(piece)]
        for piece in pieces:
            ends = b'"' in piece if place.quoted else piece in b"}]" or (piece == b"," and not closers)
            extra = weight * len(piece) + _LONGER * (endable and not ends) + (0 if weight else 10 * (piece in b"{["))
            push(cost + extra, text + piece, at, piece, place.after(piece))
    return None


def _tried(allowed: np.ndarray) -> list[int]:
    """The next bytes to try: all, or, if they are many, only some of the letters and digits."""
    if len(allowed) > _MOST_BYTES:
        allowed_set = set(allowed.tolist())
        marks, *kinds = ([byte for byte in kind if byte in allowed_set] for kind in _KINDS)
        allowed = np.array([*marks, *(byte for kind in kinds for byte in kind[:2] + kind[2:][-1:])])
    return sorted(allowed.tolist(), key=_PREFERRED.__getitem__)


def tails_of(way: bytes, place: Place) -> dict[int, bytes]:
    """By number of open brackets: the part of `way` that follows the end of a value at that depth."""
    tails: dict[int, bytes] = {}
    for at, byte in enumerate(way):
        depth = len(place.stack)
        if not place.quoted and byte in _STRUCTURE and depth not in tails:
            tails[depth] = way[at:]
        place = place.after(way[at : at + 1])
    tails.setdefault(len(place.stack), b"")
    return tails


def spelled_bytes(ids: Mapping[bytes, int]) -> np.ndarray:
    """bool (256,): the bytes that are tokens by themselves."""
    return np.array([bytes([byte]) in ids for byte in range(256)])
