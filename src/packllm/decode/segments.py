"""Cool-Fusion: members with any vocabularies write together, segment by segment (Cool-Fusion §2, METHODS §5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from packllm.decode.failures import Failures
from packllm.decode.remote import ServerWriter, each_at_once
from packllm.decode.text import TextStream
from packllm.decode.tokens import Row
from packllm.decode.writer import Judgement, Segment, Writer
from packllm.options import Scoring
from packllm.results import FinishReason, TokenLogprob
from packllm.weights.result import Weights

END_BYTES = 4
"""Bytes that the end of an answer counts as in a likelihood per byte: about one token."""

T = TypeVar("T")
AnyWriter = Writer | ServerWriter


@dataclass(frozen=True)
class ChosenSegment:
    """A chosen segment: the text of each of its author's tokens, and whether the answer ends with it."""

    pieces: tuple[str, ...]
    ends: bool


class Writers:
    """The running members, each at the end of the same text.

    Args:
        writers: by index of the member, for members with a weight other than 0.
        row: the prompt's weights and sampler; a member that fails may be dropped from the weights.
        scoring: how segments are rated, see rate().
        align: end segments at boundaries of all tokenizers; False: of the author's only (Cool−align).
        failures: decides whether a failed member is dropped; None: any failure is raised.
        top: how many proposals to report with each segment's log-likelihood; None: report nothing.
    """

    def __init__(
        self,
        writers: dict[int, AnyWriter],
        row: Row,
        scoring: Scoring = "log",
        align: bool = True,
        failures: Failures | None = None,
        top: int | None = None,
    ) -> None:
        self._writers, self._row, self._align, self._top = writers, row, align, top
        self._told: list[TokenLogprob] = []
        self._scoring: Scoring = scoring
        self._failures = failures or Failures(row.weights.names, writers, False)
        encoders = {writer.member.vocabulary.fingerprint: writer.member.encoder for writer in writers.values()}
        self._encoders = list(encoders.values())

    def write(self, limit: int) -> Iterator[ChosenSegment]:
        """Yield the best segment of each round, until the row is done, a segment ends the answer, `limit` tokens are
        written (counted by their authors), or a context window is full.

        A round: (1) members with a weight above 0 propose segments; (2) all members judge every distinct proposal;
        (3) all append the best one (the earliest member's among equals), once the next segment is requested.
        """
        remaining = limit
        while remaining > 0 and all(writer.room >= 1 for writer in self._writers.values()):
            pieces = self._propose(remaining)
            segments = [s for s in pieces if all(writer.fits(s) for writer in self._writers.values())]
            if not segments:
                if pieces:
                    return  # no proposal fits all context windows
                continue  # all members that could write failed
            if any(s.text or s.ends for s in segments):
                segments = [s for s in segments if s.text or s.ends]
            best = segments[0]
            if len(segments) > 1 or self._top is not None or self._row.moving is not None:
                judgements = self._judgements(segments)
                ratings = [rate(s, judgements[s], self._row.weights, self._scoring) for s in segments]
                best = segments[max(range(len(segments)), key=ratings.__getitem__)]
                self._tell(best, judgements)
                logprobs = {k: judgement.logprob for k, judgement in _able(judgements[best]).items()}
                self._row.observe_segment(logprobs, len(pieces[best]))
            yield ChosenSegment(pieces[best], best.ends)
            if best.ends or self._row.done:
                return
            remaining -= len(pieces[best])
            if remaining > 0:
                self._accept(best)

    def answer(self, limit: int, stream: TextStream) -> Iterator[tuple[str, FinishReason | None, int]]:
        """Write an answer: yield (final text, finish reason or None, tokens so far) after each segment.

        Args:
            limit: maximum number of tokens, counted by the authors of the segments.
            stream: holds back text that may begin a stop string.
        """
        count = 0
        for written in self.write(limit):
            text = ""
            for piece in written.pieces:
                count += 1
                text += stream.push_text(piece)
                if stream.stopped:
                    break
            if written.ends and not stream.stopped:
                text += stream.finish()
            if written.ends or stream.stopped:
                self._row.done = True
                yield text, "stop", count
                return
            yield text, None, count
        text = stream.finish()
        yield text, "stop" if stream.stopped else "length", count

    def _propose(self, budget: int) -> dict[Segment, tuple[str, ...]]:
        """Distinct proposals in member order, each with the token texts of its first author."""
        values = self._row.weights.values

        def propose(writer: AnyWriter) -> tuple[Segment, tuple[str, ...]]:
            encoders = self._encoders if self._align else [writer.member.encoder]
            return writer.propose(self._row.sample, encoders, budget), writer.pieces()

        pieces: dict[Segment, tuple[str, ...]] = {}
        for segment, token_texts in self._each(propose, [k for k in self._writers if values[k] > 0]).values():
            pieces.setdefault(segment, token_texts)
        return pieces

    def _accept(self, best: Segment) -> None:
        self._each(lambda writer: writer.accept(best))

    def rate(self, segments: Sequence[Segment]) -> list[float]:
        """The ratings of segments, higher is better. Each member reads those that it did not write in one pass."""
        judgements = self._judgements(segments)
        return [rate(segment, judgements[segment], self._row.weights, self._scoring) for segment in segments]

    def _judgements(self, segments: Sequence[Segment]) -> dict[Segment, dict[int, Judgement | None]]:
        by_member = self._each(lambda writer: writer.judge(segments))
        return {s: {k: judgements[i] for k, judgements in by_member.items()} for i, s in enumerate(segments)}

    def _tell(self, best: Segment, judgements_of: Mapping[Segment, Mapping[int, Judgement | None]]) -> None:
        if self._top is None:
            return
        weights = self._row.weights
        records = {}
        for segment, judgements in judgements_of.items():
            able = _able(judgements)
            members = {weights.names[k]: judgement.logprob for k, judgement in able.items()}
            fused = min(fused_logprob(able, weights, weights.pool == "linear"), 0.0) if able else -math.inf
            records[segment] = TokenLogprob(segment.text, tuple(segment.text.encode()), None, fused, members)
        top = sorted(records.values(), key=lambda one: -one.logprob)[: self._top]
        self._told.append(replace(records[best], top_logprobs=tuple(top)))

    def take_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Log-likelihoods of the segments since the last call; None if they are not requested."""
        records, self._told = tuple(self._told), []
        return None if self._top is None else records

    def _each(self, act: Callable[[AnyWriter], T], which: Sequence[int] | None = None) -> dict[int, T]:
        """Call `act` for each writer and return the results; failed writers are dropped (see Failures). Writers on
        servers work at the same time, in parallel to the local ones."""
        members = list(self._writers) if which is None else which
        servers = [k for k in members if isinstance(self._writers[k], ServerWriter)]
        results = each_at_once(lambda k: act(self._writers[k]), members, servers, self._failures, self._row)
        for k in members:
            if k not in results:
                self._writers.pop(k).close()
        return results

    def close(self) -> None:
        """Free the caches."""
        for writer in self._writers.values():
            writer.close()


def rate(segment: Segment, judgements: Mapping[int, Judgement | None], weights: Weights, scoring: Scoring) -> float:
    """The rating of a segment, higher is better.

    perplexity (Cool-Fusion Eq. 2 and 3, with the 1/n that Eq. 2 lacks): −mean over members of exp(−log p_k(s)/n_k),
    where n_k is the number of tokens that member k needs for s.
    mixture: log Σ λ_k p_k(s) per byte of s. log: Σ λ_k log p_k(s) per byte of s.

    Members that cannot judge the segment are left out, and the other weights renormalised.

    Args:
        judgements: of the running members, by index.
    """
    able = _able(judgements)
    if not able:
        return -math.inf
    if scoring == "perplexity":
        return -math.fsum(math.exp(min(-j.logprob / max(j.tokens, 1), 700.0)) for j in able.values()) / len(able)
    fused = fused_logprob(able, weights, mixture=scoring == "mixture")
    return fused / max(1, len(segment.text.encode()) + END_BYTES * segment.ends)


def _able(judgements: Mapping[int, Judgement | None]) -> dict[int, Judgement]:
    return {k: judgement for k, judgement in judgements.items() if judgement is not None}


def fused_logprob(able: Mapping[int, Judgement], weights: Weights, mixture: bool) -> float:
    """log Σ λ_k p_k(s) (mixture) or Σ λ_k log p_k(s), with the weights of members that can judge s renormalised."""
    total = math.fsum(weights.values[k] for k in able)
    parts = [(weights.values[k] / total, max(j.logprob, -1e30)) for k, j in able.items()]
    if not mixture:
        return math.fsum(weight * logprob for weight, logprob in parts)
    peak = max(logprob for _, logprob in parts)
    return peak + math.log(math.fsum(weight * math.exp(logprob - peak) for weight, logprob in parts))
