"""From token ids to text, at the edge: streaming UTF-8 and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from packllm.align.vocabulary import Vocabulary


class TextStream:
    """Text of a growing list of tokens, given out as soon as it is sure.

    A character split across tokens waits for its last byte. Text that may be the start of a stop string
    waits until it is known not to be; the stop string itself and what follows it are never given out. A stop string
    may hold control tokens, which are no text but stop it all the same.

    Args:
        vocabulary: what the tokens mean.
        stop: stop strings.
        shown: spellings of control tokens that are text here, such as marks of calls.

    Attributes:
        stopped: a stop string occurred.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = (), shown: Collection[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._spelled: dict[int, str] = {}
        self._stand_ins: list[str] = []
        self._stop = tuple(stop)
        if stop or shown:
            self._find_control(shown)
        self._held = ""
        self.stopped = False

    def _find_control(self, shown: Collection[str]) -> None:
        for token_id in sorted(self._vocabulary.control):
            spelling = self._vocabulary.tokens[token_id].decode(errors="replace")
            if spelling in shown:
                self._spelled[token_id] = spelling
            elif spelling and any(spelling in stop for stop in self._stop):
                # It stands in the text as half of a surrogate pair, which no decoded text holds, until it is taken out.
                stand_in = chr(0xD800 + len(self._stand_ins))
                self._stand_ins.append(stand_in)
                self._spelled[token_id] = stand_in
                self._stop += tuple(stop.replace(spelling, stand_in) for stop in self._stop if spelling in stop)

    def push(self, token_id: int) -> str:
        """Text that is sure after one more token; often empty."""
        if token_id in self._spelled:
            return self._release(self._decoder.decode(b"") + self._spelled[token_id])
        return self._release(self._decoder.decode(self._vocabulary.text_bytes(token_id)))

    def push_text(self, text: str) -> str:
        """Text that is sure after a piece that is no token but whole characters."""
        return self._release(text)

    def finish(self) -> str:
        """What was still held back, once no more tokens come."""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + self._visible(held)

    def _visible(self, text: str) -> str:
        for stand_in in self._stand_ins:
            text = text.replace(stand_in, "")
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            sure, self._held = self._held[: min(found)], ""
            return self._visible(sure)
        hold = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - hold
        sure, self._held = self._held[:cut], self._held[cut:]
        return self._visible(sure)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
