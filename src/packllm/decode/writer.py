"""One member writing and judging at the end of a text that several members share (Cool-Fusion, Table 1)."""

from __future__ import annotations

import codecs
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from packllm.chat.prompt import Encoder
from packllm.decode.boundaries import common_boundaries, inside_character
from packllm.decode.sampling import Sampler
from packllm.decode.score import Reading
from packllm.engines.transformers.member import Session

log = logging.getLogger("packllm")

SEGMENT_BYTES = 48
"""Text without a common boundary (Chinese, a long address) is cut here, at the end of a character."""


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the answer ends with it."""

    text: str
    ends: bool = False


@dataclass(frozen=True)
class Judgement:
    """What a member gives a segment: its log-likelihood in nats, and the tokens that is the sum of, among
    them the end."""

    logprob: float
    tokens: int


class Writer:
    """A member at the end of the common text: its cache, and the tokens it has written past that end.

    The tokens after a segment stay while the text goes on as they do. Where it goes on in another's words,
    the cache is rolled back to the common text and no further.

    Args:
        session: a prefilled session of one row; the writer closes it.
        prompt_tokens: length of its prompt.
        stop: stop strings; those that are control tokens end its text.

    Attributes:
        room: tokens that still fit the member's context window.
    """

    def __init__(self, session: Session, prompt_tokens: int, stop: Sequence[str] = ()) -> None:
        self.member = session.member
        window = self.member.context_window
        self.room: float = math.inf if window is None else window - prompt_tokens
        tokens, stops = self.member.vocabulary.tokens, {text.encode() for text in stop}
        self._ends = self.member.end_ids | {i for i in self.member.vocabulary.control if tokens[i] in stops}
        self._end_ids = sorted(i for i in self._ends if i < self.member.vocabulary_size)
        self._rolls_back = session.rewindable()
        if self._rolls_back:
            session.record()
        else:
            log.warning(
                "member %r: its cache cannot be rolled back; what others write is computed again", self.member.name
            )
        # A cache that cannot be rolled back stays at the end of the common text; a copy of it is written to.
        self._base = session
        self._session = session if self._rolls_back else session.fork()
        self._start_at(session.logprobs[0])
        self._start_round()

    def _start_at(self, here: Tensor) -> None:
        """Nothing is written yet; `here` is the distribution of the next token."""
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._reached: list[int] = []  # characters that are whole after each token
        self._clean: list[bool] = []  # whether none is begun after it
        self._after = [here]  # distributions: at the end of the common text, and after each token in the cache
        self._text, self._ended = "", False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _start_round(self) -> None:
        self._proposed: tuple[str, int] | None = None
        self._ids: dict[str, list[int]] = {}
        self._rows: dict[str, int] = {}  # texts that the reading is of
        self._reading: Reading | None = None

    def close(self) -> None:
        """Free the caches."""
        for held in (self._base, self._session, self._reading):
            if held is not None:
                held.close()

    # Writing

    def propose(self, sample: Sampler, encoders: Sequence[Encoder], budget: int) -> Segment:
        """The next segment: up to the first boundary common to `encoders`, of at most `budget` (≥ 1) tokens and
        what the context window has room for (≥ 1)."""
        most = int(min(budget, self.room))
        while (count := self._complete(encoders, most)) is None:
            self._write(sample)
        text = b"".join(map(self.member.vocabulary.text_bytes, self._tokens[:count])).decode(errors="replace")
        self._proposed = text, count
        return Segment(text, self._ended and count == len(self._tokens))

    def _complete(self, encoders: Sequence[Encoder], most: int) -> int | None:
        """How many of the tokens written make a segment; None if it takes more."""
        size = len(self._tokens)
        ends: dict[int, int] = {}  # no token of the author's goes across the end
        for count, (reached, clean) in enumerate(zip(self._reached[:most], self._clean, strict=False), 1):
            if clean:
                ends.setdefault(reached, count)
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
        whole = [at for at in ends if 0 < at < len(self._text) and not inside_character(self._text, at)]
        if whole:
            return ends[max(whole)]
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
        """Put the first `count` tokens into the cache, where they are not yet."""
        for token in self._tokens[len(self._after) - 1 : count]:
            self._session.step([token])
            self._after.append(self._session.logprobs[0])

    def pieces(self) -> tuple[str, ...]:
        """The text of each token of the segment proposed."""
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
        """What the member gives each segment, in its own tokens; None where it has none for it: characters that
        its tokenizer does not know, an end for a member that knows no end.

        What it wrote itself is judged already; all else goes through one batched forward.
        """
        foreign = dict.fromkeys(s.text for s in segments if self._own(s.text) is None and self._ids_of(s.text))
        if foreign:
            self._read(list(foreign))
        return [self._judgement(segment) for segment in segments]

    def _read(self, texts: Sequence[str]) -> None:
        back = len(self._after) - 1 if self._rolls_back else 0
        self._reading = Reading(self._base, self._after[0], [self._ids_of(text) for text in texts], back)
        self._rows = {text: row for row, text in enumerate(texts)}

    def _judgement(self, segment: Segment) -> Judgement | None:
        own = self._own(segment.text)
        if own is not None:
            if segment.ends:
                self._feed(own)
            values, after = self._logprobs[:own], self._after[min(own, len(self._after) - 1)]
        elif self._reading and segment.text in self._rows and not self._is_unknown(segment.text):
            row = self._rows[segment.text]
            values, after = self._reading.logprobs[row], self._reading.after[row]
        else:
            return None
        if segment.ends:
            if not self._end_ids:
                return None
            values = [*values, float(after[self._end_ids].logsumexp(0))]
        return Judgement(math.fsum(values), len(values))

    def _own(self, text: str) -> int | None:
        """How many of the tokens written make up this text; None if they do not."""
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
        if self._reading:
            self._reading.close()
        self._start_round()

    def _keep(self, count: int) -> None:
        """The text goes on as the member wrote, for `count` tokens."""
        self._feed(count)
        ids, start = self._tokens[:count], self._reached[count - 1] if count else 0
        self._tokens, self._logprobs = self._tokens[count:], self._logprobs[count:]
        self._reached, self._clean = [at - start for at in self._reached[count:]], self._clean[count:]
        self._text, self._after = self._text[start:], self._after[count:]
        if self._rolls_back:
            if len(self._after) == 1:
                self._session.rewind(0)  # sliding windows may forget what has left them
        elif len(self._after) == 1:  # the copy holds the common text and no more
            self._base.close()
            self._base, self._session = self._session, self._session.fork()
        else:
            for token in ids:
                self._base.step([token])
            self._session.close()
            self._session = self._base.fork()
            self._after = self._after[:1]

    def _replace(self, text: str) -> None:
        """The text goes on in another's words: what the member wrote is dropped."""
        if text not in self._rows:
            self._read([text])
        assert self._reading is not None
        row = self._rows[text]
        here, taken = self._reading.after[row], self._reading.take(row)
        self._base.close()
        self._session.close()
        self._base = taken
        self._session = taken if self._rolls_back else taken.fork()
        self._start_at(here)
