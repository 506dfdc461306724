"""A member's position in a text: the ids that it has read, and its log-probabilities of the next token."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from packllm.align.shared import Shared
from packllm.engines import base
from packllm.engines.base import Read, Want, read_together
from packllm.engines.member import Member
from packllm.errors import MemberError

K = TypeVar("K", bound=Hashable)


class Line:
    """A member's sequence in one request.

    Args:
        member: the member that reads.
        sequence: the ids that it has read.
        next_logprobs: float32 (V,), log-probabilities of the next token.
        shared: the shared ids that the line uses, and its member's index among theirs; None: the member's own ids.
    """

    def __init__(
        self, member: Member, sequence: base.Sequence, next_logprobs: Tensor, shared: tuple[Shared, int] | None = None
    ) -> None:
        self.member, self.sequence, self.next_logprobs = member, sequence, next_logprobs
        self._shared = shared

    def speaking(self, shared: Shared, index: int) -> Line:
        """The same line, with shared ids."""
        return Line(self.member, self.sequence, shared.rows(index, self.next_logprobs), (shared, index))

    def own(self, ids: Sequence[int]) -> Sequence[int]:
        """The member's own ids of the line's ids."""
        return ids if self._shared is None else self._shared[0].own(self._shared[1], ids)

    def in_line_ids(self, rows: Tensor) -> Tensor:
        """Map log-probabilities (..., V) of the member's own ids to the line's ids."""
        return rows if self._shared is None else self._shared[0].rows(self._shared[1], rows)

    def __len__(self) -> int:
        """The number of ids read."""
        return len(self.sequence.ids)

    def read(self, ids: Sequence[int], want: Want = "all") -> Tensor:
        """Read more ids; return what `want` says.

        Raises:
            MemberError: the member failed.
        """
        (answer,) = read_lines({None: self}, {None: ids}, want).values()
        if isinstance(answer, MemberError):
            raise answer
        return answer

    def bound(self, back: int) -> float:
        """See base.Sequence.bound, for the row `back` tokens ago."""
        return self.sequence.bound(len(self) - back)

    def whole(self, back: int) -> Tensor:
        """Read the row `back` tokens ago again, with all its entries: float32 (V,).

        Raises:
            MemberError: the member failed.
        """
        length = len(self) - back
        fork = self.sequence.fork()
        try:
            fork.crop(length - 1)
            fork.top = self.member.vocabulary_size
            (answer,) = read_together([Read(fork, self.sequence.ids[length - 1 : length], "last")])
        finally:
            fork.close()
        if isinstance(answer, Exception):
            raise self.member.failed(answer)
        return self.in_line_ids(answer)[0]

    def crop(self, length: int, next_logprobs: Tensor) -> None:
        """Go back to the first `length` tokens; `next_logprobs` is the member's prediction after them."""
        self.sequence.crop(length)
        self.next_logprobs = next_logprobs

    def fork(self) -> Line:
        """A copy that reads on independently of this line."""
        return Line(self.member, self.sequence.fork(), self.next_logprobs, self._shared)

    def close(self) -> None:
        self.sequence.close()


def read_lines(
    lines: Mapping[K, Line], blocks: Mapping[K, Sequence[int]], want: Want = "all"
) -> dict[K, Tensor | MemberError]:
    """Let several lines read one block each, in common passes where possible, and update their `next_logprobs`.

    Args:
        lines: at least the lines of `blocks`.
        blocks: at least one id each.
        want: "all" or "last".

    Returns:
        For each block what `want` says, or the error of a member that failed.
    """
    answers = read_together([Read(lines[key].sequence, lines[key].own(ids), want) for key, ids in blocks.items()])
    results: dict[K, Tensor | MemberError] = {}
    for key, answer in zip(blocks, answers, strict=True):
        line = lines[key]
        if isinstance(answer, Exception):
            results[key] = line.member.failed(answer)
        else:
            results[key] = rows = line.in_line_ids(answer)
            line.next_logprobs = rows[-1]
    return results


def open_lines(
    asked: Mapping[K, tuple[base.Sequence, Member, Sequence[int], Sequence[int]]],
) -> tuple[dict[K, Line], dict[K, Tensor], dict[K, MemberError]]:
    """Read prompts, in common passes where possible.

    Args:
        asked: new sequences, each with its member, a prompt's ids and the positions (ascending, ≥ 1) to score.

    Returns:
        Lines at the end of the prompts; the log-probabilities of the scored tokens, float64 (n,); for members that
        failed, their errors.
    """
    reads = []
    for sequence, _, ids, scored in asked.values():
        targets = [-1] * (len(ids) - 1)
        for position in scored:
            targets[position - 1] = ids[position]
        reads += [Read(sequence, ids[:-1], targets), Read(sequence, ids[-1:], "last")]
    answers = read_together(reads)
    lines, scores, failed = {}, {}, {}
    for (key, (sequence, member, _, scored)), logprobs, last in zip(
        asked.items(), answers[::2], answers[1::2], strict=True
    ):
        error = logprobs if isinstance(logprobs, Exception) else last if isinstance(last, Exception) else None
        if error is not None or isinstance(logprobs, Exception) or isinstance(last, Exception):
            failed[key] = member.failed(error or ValueError("no answer"))
            sequence.close()
        else:
            lines[key] = Line(member, sequence, last[0])
            scores[key] = logprobs[[position - 1 for position in scored]]
    return lines, scores, failed


def read_forks(line: Line, rows: Sequence[Sequence[int]]) -> tuple[list[Line], list[Tensor]]:
    """Score several continuations with forks of one line, in common passes. Each has at least one of the member's ids.

    Returns:
        The forks, at the ends of the continuations; for each the log-probabilities of its ids, float64 (n,).

    Raises:
        MemberError: the member failed; all forks are closed.
    """
    forks = [line.fork() for _ in rows]
    try:
        reads = []
        for fork, ids in zip(forks, rows, strict=True):
            reads += [Read(fork.sequence, ids[:-1], ids[1:]), Read(fork.sequence, ids[-1:], "last")]
        answers = read_together(reads)
        for answer in answers:
            if isinstance(answer, Exception):
                raise line.member.failed(answer)
    except BaseException:
        for fork in forks:
            fork.close()
        raise
    scores = []
    for fork, ids, logprobs, last in zip(forks, rows, answers[::2], answers[1::2], strict=True):
        assert not isinstance(logprobs, Exception)
        assert not isinstance(last, Exception)
        fork.next_logprobs = last[0]
        first = line.next_logprobs[ids[0]].double().cpu().reshape(1)
        scores.append(logprobs.new_tensor([*first.tolist(), *logprobs.tolist()]))
    return forks, scores


def score_rows(lines: Mapping[K, Line], rows: Mapping[K, Sequence[Sequence[int]]]) -> dict[K, list[Tensor]]:
    """Score continuations of several lines, in common passes. Each has at least one id; the lines do not move.

    Returns:
        For each key of `rows`, and each of its continuations, the log-probabilities of its ids, float64 (n,).

    Raises:
        MemberError: a member failed.
    """
    longer = [(key, r) for key, texts in rows.items() for r, ids in enumerate(texts) if len(ids) > 1]
    forks = {slot: lines[slot[0]].fork() for slot in longer}
    try:
        own = {(k, r): lines[k].own(rows[k][r]) for k, r in longer}
        answers = read_together([Read(forks[slot].sequence, own[slot][:-1], own[slot][1:]) for slot in longer])
    finally:
        for fork in forks.values():
            fork.close()
    logprobs: dict[tuple[K, int], list[float]] = {}
    for slot, answer in zip(longer, answers, strict=True):
        if isinstance(answer, Exception):
            raise lines[slot[0]].member.failed(answer)
        logprobs[slot] = answer.tolist()
    return {
        key: [
            torch.tensor([float(lines[key].next_logprobs[ids[0]]), *logprobs.get((key, r), ())], dtype=torch.float64)
            for r, ids in enumerate(texts)
        ]
        for key, texts in rows.items()
    }
