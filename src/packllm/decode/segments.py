"""Cool-Fusion: members of any vocabularies write together, segment by segment (Cool-Fusion §2, METHODS §5)."""

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
"""What the end of an answer counts for in a likelihood per byte: about as much as one token."""

T = TypeVar("T")
AnyWriter = Writer | ServerWriter


@dataclass(frozen=True)
class Written:
    """A segment that won: the text of each of its author's tokens, and whether the answer ends with it."""

    pieces: tuple[str, ...]
    ends: bool


class Writers:
    """The members that run, each at the end of the same text.

    Args:
        writers: by index of the member, for those whose weight is not 0.
        row: the prompt's weights and sampler; its weights may lose a member that fails.
        scoring: how segments are rated, see rate().
        align: end segments at boundaries of all tokenizers; False: of their author's alone (Cool−align).
        failures: what becomes of a member that fails; None: it ends the work.
        top: how many proposals to tell the log-likelihood of beside each segment's; None: nobody asks.
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

    def write(self, limit: int) -> Iterator[Written]:
        """The best segment of each round, until the row is done, one ends the answer, they hold `limit` tokens
        of their authors, or a context window is full.

        A round: (1) members with a weight above 0 propose; (2) all judge every distinct proposal; (3) the best
        (of equals the earliest member's) is appended for all, when the next one is asked for.
        """
        left = limit
        while left > 0 and all(writer.room >= 1 for writer in self._writers.values()):
            pieces = self._propose(left)
            segments = [s for s in pieces if all(writer.fits(s) for writer in self._writers.values())]
            if not segments:
                if pieces:
                    return  # no window has room for any of them
                continue  # all that could write failed
            if any(s.text or s.ends for s in segments):
                segments = [s for s in segments if s.text or s.ends]
            best = segments[0]
            if len(segments) > 1 or self._top is not None or self._row.moving is not None:
                judged = self._judged(segments)
                ratings = [rate(s, judged[s], self._row.weights, self._scoring) for s in segments]
                best = segments[max(range(len(segments)), key=ratings.__getitem__)]
                self._tell(best, judged)
                heard = {k: judgement.logprob for k, judgement in _able(judged[best]).items()}
                self._row.hear(heard, len(pieces[best]))
            yield Written(pieces[best], best.ends)
            if best.ends or self._row.done:
                return
            left -= len(pieces[best])
            if left > 0:
                self._accept(best)

    def answer(self, limit: int, stream: TextStream) -> Iterator[tuple[str, FinishReason | None, int]]:
        """Write an answer: (text that is sure, why it ends or None, tokens so far) after each segment.

        Args:
            limit: most tokens, counted in those of whoever wrote them.
            stream: holds back what may begin a stop string.
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
        """Distinct proposals in member order, each with the text of its first author's tokens."""
        values = self._row.weights.values

        def propose(writer: AnyWriter) -> tuple[Segment, tuple[str, ...]]:
            encoders = self._encoders if self._align else [writer.member.encoder]
            return writer.propose(self._row.sample, encoders, budget), writer.pieces()

        pieces: dict[Segment, tuple[str, ...]] = {}
        for segment, spelled in self._each(propose, [k for k in self._writers if values[k] > 0]).values():
            pieces.setdefault(segment, spelled)
        return pieces

    def _accept(self, best: Segment) -> None:
        self._each(lambda writer: writer.accept(best))

    def rate(self, segments: Sequence[Segment]) -> list[float]:
        """Every segment's rating, higher is better: each member reads those it did not write in one forward."""
        judged = self._judged(segments)
        return [rate(segment, judged[segment], self._row.weights, self._scoring) for segment in segments]

    def _judged(self, segments: Sequence[Segment]) -> dict[Segment, dict[int, Judgement | None]]:
        judged = self._each(lambda writer: writer.judge(segments))
        return {s: {k: judgements[i] for k, judgements in judged.items()} for i, s in enumerate(segments)}

    def _tell(self, best: Segment, judged: Mapping[Segment, Mapping[int, Judgement | None]]) -> None:
        if self._top is None:
            return
        weights = self._row.weights
        told = {}
        for segment, judgements in judged.items():
            able = _able(judgements)
            members = {weights.names[k]: judgement.logprob for k, judgement in able.items()}
            fused = min(fused_logprob(able, weights, weights.pool == "linear"), 0.0) if able else -math.inf
            told[segment] = TokenLogprob(segment.text, tuple(segment.text.encode()), None, fused, members)
        top = sorted(told.values(), key=lambda one: -one.logprob)[: self._top]
        self._told.append(replace(told[best], top_logprobs=tuple(top)))

    def told(self) -> tuple[TokenLogprob, ...] | None:
        """Log-likelihoods of the segments since the last time; None where nobody asks."""
        told, self._told = tuple(self._told), []
        return None if self._top is None else told

    def _each(self, act: Callable[[AnyWriter], T], which: Sequence[int] | None = None) -> dict[int, T]:
        """What `act` gives for each writer; those that fail are let go of (see Failures). Servers work at the same
        time, and beside what runs here."""
        asked = list(self._writers) if which is None else which
        servers = [k for k in asked if isinstance(self._writers[k], ServerWriter)]
        results = each_at_once(lambda k: act(self._writers[k]), asked, servers, self._failures, self._row)
        for k in asked:
            if k not in results:
                self._writers.pop(k).close()
        return results

    def close(self) -> None:
        """Free the caches."""
        for writer in self._writers.values():
            writer.close()


def rate(segment: Segment, judgements: Mapping[int, Judgement | None], weights: Weights, scoring: Scoring) -> float:
    """How good a segment is, higher is better.

    perplexity (Cool-Fusion Eq. 2 and 3, with the 1/n that Eq. 2 lacks): −mean over members of exp(−log p_k(s)/n_k),
    n_k the tokens that member k has for it.
    mixture: log Σ λ_k p_k(s) per byte of s. log: Σ λ_k log p_k(s) per byte of s.

    Members that cannot judge it are left out, and the others' weights renormalised.

    Args:
        judgements: of the members that run, by index.
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
    """log Σ λ_k p_k(s) (mixture) or Σ λ_k log p_k(s). The weights of members that can judge it are renormalised."""
    total = math.fsum(weights.values[k] for k in able)
    parts = [(weights.values[k] / total, max(j.logprob, -1e30)) for k, j in able.items()]
    if not mixture:
        return math.fsum(weight * logprob for weight, logprob in parts)
    peak = max(logprob for _, logprob in parts)
    return peak + math.log(math.fsum(weight * math.exp(logprob - peak) for weight, logprob in parts))
