"""From token ids to text: streaming UTF-8 and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from packllm.align.vocabulary import Vocabulary
from packllm.chat.reasoning import ReasoningStream


class TextStream:
    """Turns tokens into text, which is returned as soon as it is final.

    A character that is split across tokens waits for its last byte. Text that may begin a stop string waits until this
    is decided. The stop string and what follows it are never returned. A stop string may contain control tokens: they
    are no text, but stop it all the same.

    Args:
        vocabulary: the vocabulary of the tokens.
        stop: stop strings.
        shown: spellings of control tokens to return as text, such as the marks of tool calls.
        thoughts: a parser of the reasoning before the answer, for its tokens to be counted; None: there is none.

    Attributes:
        stopped: whether a stop string occurred.
        reasoning_tokens: how many tokens came until the end of the reasoning, including its marks.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        stop: Sequence[str] = (),
        shown: Collection[str] = (),
        thoughts: ReasoningStream | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._spelled: dict[int, str] = {}
        self._stand_ins: list[str] = []
        self._stop = tuple(stop)
        if stop or shown:
            self._find_control(shown)
        self._held = ""
        self.stopped = False
        self._thoughts, self._tokens, self.reasoning_tokens = thoughts, 0, 0

    def _find_control(self, shown: Collection[str]) -> None:
        for token_id in sorted(self._vocabulary.control):
            spelling = self._vocabulary.tokens[token_id].decode(errors="replace")
            if spelling in shown:
                self._spelled[token_id] = spelling
            elif spelling and any(spelling in stop for stop in self._stop):
                # A surrogate, which no decoded text contains, marks the token in the text; _visible removes it.
                stand_in = chr(0xD800 + len(self._stand_ins))
                self._stand_ins.append(stand_in)
                self._spelled[token_id] = stand_in
                self._stop += tuple(stop.replace(spelling, stand_in) for stop in self._stop if spelling in stop)

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is now final, often ""."""
        if token_id in self._spelled:
            return self.push_text(self._decoder.decode(b"") + self._spelled[token_id])
        return self.push_text(self._decoder.decode(self._vocabulary.text_bytes(token_id)))

    def push_text(self, text: str) -> str:
        """Add a token as whole characters; return the text that is now final."""
        self._tokens += 1
        if self._thoughts is not None and not self._thoughts.over:
            closed = self._thoughts.closed
            self._thoughts.feed(self._visible(text))
            if self._thoughts.inside or self._thoughts.closed > closed:
                self.reasoning_tokens = self._tokens
        return self._release(text)

    def finish(self) -> str:
        """The text that was held back; no more tokens come."""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + self._visible(rest)

    def _visible(self, text: str) -> str:
        for stand_in in self._stand_ins:
            text = text.replace(stand_in, "")
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        positions = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if positions:
            self.stopped = True
            final, self._held = self._held[: min(positions)], ""
            return self._visible(final)
        hold = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - hold
        final, self._held = self._held[:cut], self._held[cut:]
        return self._visible(final)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
