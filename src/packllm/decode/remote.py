"""A member on a server, writing and judging at the end of a text that several members share (Cool-Fusion)."""

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
from packllm.engines.server.answers import Given
from packllm.engines.server.http import Gate
from packllm.engines.server.judge import Asked
from packllm.engines.server.member import ServerMember
from packllm.errors import CancelledError, MemberError, blamed_on
from packllm.options import Options
from packllm.results import Bill

T = TypeVar("T")


class ServerLine:
    """A member on a server in one request: what it is asked, and what that costs. It keeps nothing there.

    Attributes:
        scored: what it gave the scored text of the prompt; None: nothing that can be used.
        bill: its requests.
    """

    def __init__(self, member: ServerMember, asked: Asked, options: Options, gate: Gate) -> None:
        self.member, self.asked, self._gate = member, asked, gate
        self.closed = False
        self.scored: Given | None = None
        self.bill = Bill()
        self._sampling: dict[str, Any] = {"temperature": options.temperature}
        if options.temperature > 0:
            said = {"top_p": options.top_p, "top_k": options.top_k, "min_p": options.min_p, "seed": options.seed}
            unset = {"top_p": 1.0, "top_k": None, "min_p": 0.0, "seed": None}
            self._sampling |= {name: value for name, value in said.items() if value != unset[name]}

    def read(self) -> None:
        """Have the prompt judged, where the member can.

        Raises:
            MemberError: the server failed.
        """
        if self.member.kind == "judge":
            with blamed_on(self.member.name):
                self.scored = self.member.score(self.asked, self.bill, self.gate)

    @property
    def prompt_tokens(self) -> int:
        """The first count of the prompt's tokens that the server told; 0 where it told none."""
        return self.bill.prompt_tokens

    def encoded(self) -> Encoded:
        """The prompt in the server's tokens, as far as it told them."""
        assert self.scored is not None
        if self.asked.ids and self.scored.starts == self.asked.starts:
            return self.asked
        told = _scored(self.scored)
        return Encoded(told.ids, self.asked.text, told.positions, told.starts, told.ends)

    def spelled(self, texts: Sequence[str]) -> list[Scored | None]:
        """What the member gives texts that come after the prompt, in the server's tokens; None: it cannot tell."""
        return [None if given is None else _scored(given) for given in self.judge("", texts)]

    def write(self, text: str, budget: int) -> Generator[str | None, None, None]:
        """See ServerMember.write; errors are the member's."""
        with blamed_on(self.member.name):
            yield from self.member.write(self.asked, text, budget, self._sampling, self.bill, self.gate)

    def judge(self, text: str, segments: Sequence[str]) -> list[Given | None]:
        """See ServerMember.judge; errors are the member's."""
        with blamed_on(self.member.name):
            return self.member.judge(self.asked, text, segments, self.bill, self.gate)

    def gate(self) -> None:
        """CancelledError where nobody waits any more; see Request.check."""
        if self.closed:
            raise CancelledError("the member is not asked any more")
        self._gate()

    def fork(self) -> ServerLine:
        """The same once more, on the same bill."""
        twin = copy.copy(self)
        twin.closed = False
        return twin

    def close(self) -> None:
        """What is asked just now, in any thread, comes to nothing."""
        self.closed = True


@contextmanager
def reading(
    lines: Mapping[tuple[int, int], ServerLine],
) -> Iterator[Callable[[], dict[tuple[int, int], Tensor | MemberError | None]]]:
    """Let servers judge prompts, all at the same time and beside what happens inside; what is given waits for them:
    float64 (n,), None or the error of each."""

    def one(line: ServerLine) -> Tensor | MemberError | None:
        try:
            line.read()
        except MemberError as error:
            return error
        return None if line.scored is None else torch.tensor(line.scored.logprobs, dtype=torch.float64)

    with ThreadPoolExecutor(max(1, len(lines))) as pool:
        begun = {slot: pool.submit(one, line) for slot, line in lines.items()}
        yield lambda: {slot: answer.result() for slot, answer in begun.items()}


def each_at_once(
    act: Callable[[int], T], which: Sequence[int], servers: Collection[int], failures: Failures, row: Weighed
) -> dict[int, T]:
    """As Failures.each; those on servers work at the same time, and beside what runs here. Where one fails, the others
    are not waited for."""
    far = [k for k in which if k in servers]
    pool = ThreadPoolExecutor(max(1, len(far)))
    try:
        begun = {k: pool.submit(act, k) for k in far}
        return failures.each(lambda k: begun[k].result() if k in begun else act(k), which, row)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class ServerWriter:
    """As Writer, of a member on a server. It reads its stream as far as it needs, and keeps what it has read past the
    end of the common text while the text goes on as it does; else the stream is dropped.

    Args:
        line: in whose request.
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
        """Drop the connection, from any thread."""
        self._line.close()
        self._drop()

    def _drop(self) -> None:
        if self._stream is not None:
            with suppress(ValueError):  # it is being read, and comes to nothing there
                self._stream.close()
        self._stream = None

    def propose(self, sample: Sampler, encoders: Sequence[Encoder], budget: int) -> Segment:
        """The next segment, of at most `budget` pieces, which are a token or a few."""
        while (size := self._complete(encoders, budget)) is None:
            self._write(budget)
        text, pieces, left = "".join(self._pieces), [], size
        for piece in self._pieces:
            if left > 0:
                pieces.append(piece[:left])
            left -= len(piece)
        self._proposed = text[:size], tuple(pieces)
        return Segment(text[:size], self._ended and size == len(text))

    def _complete(self, encoders: Sequence[Encoder], budget: int) -> int | None:
        """How many characters of what is written make a segment; None if it takes more."""
        within = "".join(self._pieces[:budget])
        for at in common_boundaries("".join(self._pieces), encoders):
            if at <= len(within):
                return at
        if self._ended or self._full or len(self._pieces) >= budget:
            return len(within)
        if len(within.encode()) < SEGMENT_BYTES:
            return None
        return max((at for at in range(1, len(within)) if not inside_character(within, at)), default=None)

    def _write(self, budget: int) -> None:
        if self._stream is None:
            self._stream = self._line.write(self._common + "".join(self._pieces), budget)
        piece = next(self._stream, _FULL)
        if piece is None:
            self._ended = True
        elif isinstance(piece, str):
            self._pieces.append(piece)
        else:  # what the server would write, within its own limits
            self._stream, self._full = None, True
            if not self._pieces:
                self.room = 0

    def pieces(self) -> tuple[str, ...]:
        """The segment proposed, as it came."""
        assert self._proposed is not None
        return self._proposed[1]

    def fits(self, segment: Segment) -> bool:
        """A server says itself when a text is too long for it."""
        return True

    def judge(self, segments: Sequence[Segment]) -> list[Judgement | None]:
        """What the member gives each segment; None where it cannot tell."""
        if self.member.kind == "author":
            return [None] * len(segments)
        texts = list(dict.fromkeys(segment.text for segment in segments))
        given = dict(zip(texts, self._line.judge(self._common, texts), strict=True))
        return [_judgement(segment, given[segment.text]) for segment in segments]

    def accept(self, segment: Segment) -> None:
        """Move the end of the common text past a segment."""
        self._common += segment.text
        ahead = "".join(self._pieces)
        if not ahead.startswith(segment.text):
            self._drop()
            self._start()
            return
        left = len(segment.text)
        while left and left >= len(self._pieces[0]):
            left -= len(self._pieces.pop(0))
        if left:
            self._pieces[0] = self._pieces[0][left:]
        self._full, self._proposed = False, None


_FULL = object()


def _scored(given: Given) -> Scored:
    """The ids are made up, so that tokens are the same where they are cut at the same places."""
    count = list(range(len(given.logprobs)))
    ids = [-1 - i for i in count]  # no tokenizer's
    return Scored(ids, given.starts, given.ends, count, torch.tensor(given.logprobs, dtype=torch.float64))


def _judgement(segment: Segment, given: Given | None) -> Judgement | None:
    if given is None:
        return None
    logprobs = [*given.logprobs, *([given.end] if segment.ends else [])]
    return Judgement(math.fsum(logprobs), len(logprobs))
