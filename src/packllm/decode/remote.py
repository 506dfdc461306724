"""A member on a server as a member of Cool-Fusion: it writes and rates segments after a text that members share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from packllm.align.words import Scored
from packllm.chat.prompt import Encoded, Encoder
from packllm.decode.boundaries import common_boundaries, inside_character
from packllm.decode.failures import Failures, Weighed
from packllm.decode.sampling import Sampler
from packllm.decode.writer import SEGMENT_BYTES, Judgement, Segment
from packllm.engines.server.answers import TextLogprobs
from packllm.engines.server.http import Gate
from packllm.engines.server.judge import Asked
from packllm.engines.server.member import ServerMember
from packllm.errors import CancelledError, MemberError, blamed_on
from packllm.options import Options
from packllm.results import Bill

T = TypeVar("T")


class ServerLine:
    """A member on a server in one request. No state is kept on the server.

    Attributes:
        scored: the prompt's log-probabilities; None if the server reported none that can be used.
        bill: the number and cost of its requests.
    """

    def __init__(self, member: ServerMember, asked: Asked, options: Options, gate: Gate) -> None:
        self.member, self.asked, self._gate = member, asked, gate
        self.closed = False
        self.scored: TextLogprobs | None = None
        self.bill = Bill()
        self._sampling: dict[str, Any] = {"temperature": options.temperature}
        if options.temperature > 0:
            values = {"top_p": options.top_p, "top_k": options.top_k, "min_p": options.min_p, "seed": options.seed}
            unset = {"top_p": 1.0, "top_k": None, "min_p": 0.0, "seed": None}
            self._sampling |= {name: value for name, value in values.items() if value != unset[name]}

    def read(self) -> None:
        """Let the server score the prompt, if the member can.

        Raises:
            MemberError: the server failed.
        """
        if self.member.kind == "judge":
            with blamed_on(self.member.name):
                self.scored = self.member.score(self.asked, self.bill, self.gate)

    @property
    def prompt_tokens(self) -> int:
        """The first count of prompt tokens that the server reported; 0 if none."""
        return self.bill.prompt_tokens

    def encoded(self) -> Encoded:
        """The prompt in the server's tokens, as far as they are known."""
        assert self.scored is not None
        if self.asked.ids and self.scored.starts == self.asked.starts:
            return self.asked
        tokens = _scored(self.scored)
        return Encoded(tokens.ids, self.asked.text, tokens.positions, tokens.starts, tokens.ends)

    def spelled(self, texts: Sequence[str]) -> list[Scored | None]:
        """The log-probabilities of texts after the prompt, in the server's tokens; None where they are unknown."""
        return [None if result is None else _scored(result) for result in self.judge("", texts)]

    def write(self, text: str, budget: int) -> Generator[str | None, None, None]:
        """See ServerMember.write; errors name the member."""
        with blamed_on(self.member.name):
            yield from self.member.write(self.asked, text, budget, self._sampling, self.bill, self.gate)

    def judge(self, text: str, segments: Sequence[str]) -> list[TextLogprobs | None]:
        """See ServerMember.judge; errors name the member."""
        with blamed_on(self.member.name):
            return self.member.judge(self.asked, text, segments, self.bill, self.gate)

    def gate(self) -> None:
        """Raise CancelledError if the result is no longer wanted; see Request.check."""
        if self.closed:
            raise CancelledError("the request to this member was cancelled")
        self._gate()

    def fork(self) -> ServerLine:
        """A copy with the same bill."""
        twin = copy.copy(self)
        twin.closed = False
        return twin

    def close(self) -> None:
        """Cancel the request in progress, whichever thread runs it."""
        self.closed = True


@contextmanager
def reading(
    lines: Mapping[tuple[int, int], ServerLine],
) -> Iterator[Callable[[], dict[tuple[int, int], Tensor | MemberError | None]]]:
    """Let servers score prompts, all at the same time and in parallel to the body. The function that is yielded waits
    for the results: float64 (n,), None, or an error for each."""

    def one(line: ServerLine) -> Tensor | MemberError | None:
        try:
            line.read()
        except MemberError as error:
            return error
        return None if line.scored is None else torch.tensor(line.scored.logprobs, dtype=torch.float64)

    with ThreadPoolExecutor(max(1, len(lines))) as pool:
        futures = {slot: pool.submit(one, line) for slot, line in lines.items()}
        yield lambda: {slot: answer.result() for slot, answer in futures.items()}


def each_at_once(
    act: Callable[[int], T], which: Sequence[int], servers: Collection[int], failures: Failures, row: Weighed
) -> dict[int, T]:
    """As Failures.each, with members on servers working at the same time and in parallel to the local ones. If one
    fails, the others are not waited for."""
    remote = [k for k in which if k in servers]
    pool = ThreadPoolExecutor(max(1, len(remote)))
    try:
        futures = {k: pool.submit(act, k) for k in remote}
        return failures.each(lambda k: futures[k].result() if k in futures else act(k), which, row)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class ServerWriter:
    """A Writer for a member on a server. It reads the server's stream as far as needed. It keeps text beyond the common
    text as long as the common text continues in the same way; otherwise it drops the stream.

    Args:
        line: the member's line in the request.
    """

    room: float = math.inf

    def __init__(self, line: ServerLine) -> None:
        self.member, self._line = line.member, line
        self._common = ""
        self._start()

    def _start(self) -> None:
        self._pieces: list[str] = []
        self._ended = self._full = False
        self._stream: Generator[str | None, None, None] | None = None
        self._proposed: tuple[str, tuple[str, ...]] | None = None

    def close(self) -> None:
        """Drop the connection; any thread may call this."""
        self._line.close()
        self._drop()

    def _drop(self) -> None:
        if self._stream is not None:
            with suppress(ValueError):  # another thread is reading it, and ends there
                self._stream.close()
        self._stream = None

    def propose(self, sample: Sampler, encoders: Sequence[Encoder], budget: int) -> Segment:
        """The next segment of at most `budget` pieces; a piece is one token or a few."""
        while (size := self._complete(encoders, budget)) is None:
            self._write(budget)
        text, pieces, remaining = "".join(self._pieces), [], size
        for piece in self._pieces:
            if remaining > 0:
                pieces.append(piece[:remaining])
            remaining -= len(piece)
        self._proposed = text[:size], tuple(pieces)
        return Segment(text[:size], self._ended and size == len(text))

    def _complete(self, encoders: Sequence[Encoder], budget: int) -> int | None:
        """The number of characters of a complete segment in the text so far; None if more is needed."""
        allowed = "".join(self._pieces[:budget])
        for at in common_boundaries("".join(self._pieces), encoders):
            if at <= len(allowed):
                return at
        if self._ended or self._full or len(self._pieces) >= budget:
            return len(allowed)
        if len(allowed.encode()) < SEGMENT_BYTES:
            return None
        return max((at for at in range(1, len(allowed)) if not inside_character(allowed, at)), default=None)

    def _write(self, budget: int) -> None:
        if self._stream is None:
            self._stream = self._line.write(self._common + "".join(self._pieces), budget)
        piece = next(self._stream, _FULL)
        if piece is None:
            self._ended = True
        elif isinstance(piece, str):
            self._pieces.append(piece)
        else:  # the server stopped at its own limit
            self._stream, self._full = None, True
            if not self._pieces:
                self.room = 0

    def pieces(self) -> tuple[str, ...]:
        """The pieces of the proposed segment, as the server sent them."""
        assert self._proposed is not None
        return self._proposed[1]

    def fits(self, segment: Segment) -> bool:
        """Always True: the server reports itself when a text is too long."""
        return True

    def judge(self, segments: Sequence[Segment]) -> list[Judgement | None]:
        """The member's log-probability of each segment; None where it is unknown."""
        if self.member.kind == "author":
            return [None] * len(segments)
        texts = list(dict.fromkeys(segment.text for segment in segments))
        results = dict(zip(texts, self._line.judge(self._common, texts), strict=True))
        return [_judgement(segment, results[segment.text]) for segment in segments]

    def accept(self, segment: Segment) -> None:
        """Move the end of the common text past a segment."""
        self._common += segment.text
        ahead = "".join(self._pieces)
        if not ahead.startswith(segment.text):
            self._drop()
            self._start()
            return
        remaining = len(segment.text)
        while remaining and remaining >= len(self._pieces[0]):
            remaining -= len(self._pieces.pop(0))
        if remaining:
            self._pieces[0] = self._pieces[0][remaining:]
        self._full, self._proposed = False, None


_FULL = object()


def _scored(tokens: TextLogprobs) -> Scored:
    """Log-probabilities with made-up ids, so that tokens count as equal if they are cut at the same places."""
    count = list(range(len(tokens.logprobs)))
    ids = [-1 - i for i in count]  # no tokenizer's
    return Scored(ids, tokens.starts, tokens.ends, count, torch.tensor(tokens.logprobs, dtype=torch.float64))


def _judgement(segment: Segment, tokens: TextLogprobs | None) -> Judgement | None:
    if tokens is None:
        return None
    logprobs = [*tokens.logprobs, *([tokens.end] if segment.ends else [])]
    return Judgement(math.fsum(logprobs), len(logprobs))
