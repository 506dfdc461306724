"""One local member that writes and judges segments after a text that several members share (Cool-Fusion, Table 1)."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from packllm.chat.prompt import Encoder
from packllm.decode.boundaries import common_boundaries, inside_character
from packllm.decode.line import Line, read_forks
from packllm.decode.sampling import Sampler

SEGMENT_BYTES = 48
"""A segment without a common boundary (Chinese, a long address) ends after so many bytes, between characters."""


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the answer ends with it."""

    text: str
    ends: bool = False


@dataclass(frozen=True)
class Judgement:
    """A member's log-likelihood of a segment in nats, and the number of tokens that it sums over, the end included."""

    logprob: float
    tokens: int


class Writer:
    """A member at the end of the common text, and the tokens that it has written beyond it.

    Tokens beyond a segment are kept as long as the common text continues in the same way. If it continues with another
    member's words, the member goes back to the common text.

    Args:
        line: the member's line at the end of a prompt; the writer closes it.
        stop: stop strings; those that are control tokens end the member's text.

    Attributes:
        room: tokens that still fit the member's context window.
    """

    def __init__(self, line: Line, stop: Sequence[str] = ()) -> None:
        self.member = line.member
        window = self.member.context_window
        self.room: float = math.inf if window is None else window - len(line)
        tokens, stops = self.member.vocabulary.tokens, {text.encode() for text in stop}
        self._ends = self.member.end_ids | {i for i in self.member.vocabulary.control if tokens[i] in stops}
        self._end_ids = sorted(i for i in self._ends if i < self.member.vocabulary_size)
        self._line, self._start = line, len(line)
        self._start_at(line.next_logprobs)
        self._start_round()

    def _start_at(self, here: Tensor) -> None:
        """Start without written tokens; `here` is the distribution of the next token."""
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._reached: list[int] = []  # complete characters after each token
        self._clean: list[bool] = []  # whether no character is incomplete after it
        self._after = [here]  # distributions: at the end of the common text, and after each token that was read
        self._text, self._ended = "", False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _start_round(self) -> None:
        self._proposed: tuple[str, int] | None = None
        self._ids: dict[str, list[int]] = {}
        self._read_texts: dict[str, tuple[Line, list[float]]] = {}  # its log-probabilities of other members' segments

    def close(self) -> None:
        """Free the caches."""
        self._line.close()
        self._drop_readings()

    def _drop_readings(self) -> None:
        for line, _ in self._read_texts.values():
            line.close()
        self._read_texts = {}

    # Writing

    def propose(self, sample: Sampler, encoders: Sequence[Encoder], budget: int) -> Segment:
        """The next segment: it ends at the first boundary common to `encoders`, and has at most `budget` (≥ 1) tokens
        and at most `room` (≥ 1)."""
        most = int(min(budget, self.room))
        while (count := self._complete(encoders, most)) is None:
            self._write(sample)
        text = b"".join(map(self.member.vocabulary.text_bytes, self._tokens[:count])).decode(errors="replace")
        self._proposed = text, count
        return Segment(text, self._ended and count == len(self._tokens))

    def _complete(self, encoders: Sequence[Encoder], most: int) -> int | None:
        """How many of the written tokens make a segment; None if more are needed."""
        size = len(self._tokens)
        ends: dict[int, int] = {}  # character offsets where a token ends
        for count, (offset, is_boundary) in enumerate(zip(self._reached[:most], self._clean, strict=False), 1):
            if is_boundary:
                ends.setdefault(offset, count)
        for at in common_boundaries(self._text, encoders):
            if at in ends:
                return ends[at]
        if self._ended and size <= most:
            return size
        if size >= most:
            return most
        length = max(size, len(self._text.encode()))
        if length < SEGMENT_BYTES:
            return None
        between_characters = [at for at in ends if 0 < at < len(self._text) and not inside_character(self._text, at)]
        if between_characters:
            return ends[max(between_characters)]
        return size if length >= 2 * SEGMENT_BYTES else None

    def _write(self, sample: Sampler) -> None:
        self._feed(len(self._tokens))
        here = self._after[-1]
        token = sample(here)
        if token in self._ends:
            self._ended = True
            return
        self._tokens.append(token)
        self._logprobs.append(float(here[token]))
        self._text += self._decoder.decode(self.member.vocabulary.text_bytes(token))
        self._reached.append(len(self._text))
        self._clean.append(not self._decoder.getstate()[0])

    def _feed(self, count: int) -> None:
        """Read the first `count` written tokens, those that are not read yet."""
        for token in self._tokens[len(self._after) - 1 : count]:
            self._after.append(self._line.read([token], "last")[0])

    def pieces(self) -> tuple[str, ...]:
        """The text of each token of the proposed segment."""
        assert self._proposed is not None
        text, count = self._proposed
        cuts = [0, *self._reached[: count - 1], len(text)] if count else [0]
        return tuple(text[start:end] for start, end in pairwise(cuts))

    # Judging

    def fits(self, segment: Segment) -> bool:
        """Whether the context window has room for a segment."""
        own = self._own(segment.text)
        return (len(self._ids_of(segment.text)) if own is None else own) <= self.room

    def judge(self, segments: Sequence[Segment]) -> list[Judgement | None]:
        """The member's log-likelihood of each segment. None if it cannot have one: for characters that its tokenizer
        does not know, or for an end if it has no end token.

        Segments that it wrote itself are known already; all others are read in one batched pass.
        """
        foreign = dict.fromkeys(s.text for s in segments if self._own(s.text) is None and self._ids_of(s.text))
        if foreign:
            self._read(list(foreign))
        return [self._judgement(segment) for segment in segments]

    def _read(self, texts: Sequence[str]) -> None:
        base = self._line.fork()
        try:
            base.crop(self._start, self._after[0])
            lines, scores = read_forks(base, [self._ids_of(text) for text in texts])
        finally:
            base.close()
        for text, line, logprobs in zip(texts, lines, scores, strict=True):
            self._read_texts[text] = line, logprobs.tolist()

    def _judgement(self, segment: Segment) -> Judgement | None:
        own = self._own(segment.text)
        if own is not None:
            if segment.ends:
                self._feed(own)
            values, after = self._logprobs[:own], self._after[min(own, len(self._after) - 1)]
        elif segment.text in self._read_texts and not self._is_unknown(segment.text):
            line, values = self._read_texts[segment.text]
            after = line.next_logprobs
        else:
            return None
        if segment.ends:
            if not self._end_ids:
                return None
            values = [*values, float(after[self._end_ids].logsumexp(0))]
        return Judgement(math.fsum(values), len(values))

    def _own(self, text: str) -> int | None:
        """How many of the written tokens spell this text; None if they do not."""
        if self._proposed is not None and self._proposed[0] == text:
            return self._proposed[1]
        if not text:
            return 0
        if not self._text.startswith(text):
            return None
        ends = zip(self._reached, self._clean, strict=True)
        return next((count for count, end in enumerate(ends, 1) if end == (len(text), True)), None)

    def _ids_of(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.member.encoder.continuation(text)
        return self._ids[text]

    def _is_unknown(self, text: str) -> bool:
        return self.member.vocabulary.special.get("unk") in self._ids_of(text)

    # Going on

    def accept(self, segment: Segment) -> None:
        """Move the end of the common text past a segment."""
        own = self._own(segment.text)
        if own is not None:
            self.room -= own
            self._keep(own)
        elif ids := self._ids_of(segment.text):
            self.room -= len(ids)
            self._replace(segment.text)
        self._drop_readings()
        self._start_round()

    def _keep(self, count: int) -> None:
        """The common text continues as the member wrote, for `count` tokens."""
        self._feed(count)
        start = self._reached[count - 1] if count else 0
        self._tokens, self._logprobs = self._tokens[count:], self._logprobs[count:]
        self._reached, self._clean = [at - start for at in self._reached[count:]], self._clean[count:]
        self._text, self._after = self._text[start:], self._after[count:]
        self._start += count

    def _replace(self, text: str) -> None:
        """The common text continues with another member's words: drop what this member wrote."""
        if text not in self._read_texts:
            self._read([text])
        line, _ = self._read_texts.pop(text)
        self._line.close()
        self._line, self._start = line, len(line)
        self._start_at(line.next_logprobs)
