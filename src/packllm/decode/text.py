"""From token ids to text, at the edge: streaming UTF-8 and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from packllm.align.vocabulary import Vocabulary


class TextStream:
    """Text of a growing list of tokens, given out as soon as it is sure.

    A character split across tokens waits for its last byte. Text that may be the start of a stop string
    waits until it is known not to be; the stop string itself and what follows it are never given out.

    Attributes:
        stopped: a stop string occurred.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is sure after one more token; often empty."""
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
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            sure, self._held = self._held[: min(found)], ""
            return sure
        hold = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - hold
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
