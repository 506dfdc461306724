"""Reads one text with every member once, so that all methods can use the results (METHODS §3, §4)."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from packllm.align.words import Scored, common_tokens, common_words, is_word_boundary
from packllm.chat.prompt import Encoded, Encoder, check
from packllm.decode.line import Line, open_lines, read_lines, score_rows
from packllm.decode.pool import fuse
from packllm.decode.tokens import drop_small, shared_by
from packllm.engines.base import KeepsHidden
from packllm.engines.member import Member
from packllm.engines.prefix import PrefixCache
from packllm.errors import ContextOverflowError, DataError, MemberError
from packllm.options import Options
from packllm.weights import Weights
from packllm.weights.blocks import grid_losses, margins
from packllm.weights.common import scored
from packllm.weights.scoring import source_of, weights_of

TOGETHER = 8
"""Continuations that a member reads in one pass, at most."""


class Reading:
    """A text in pieces, read by every member in one pass.

    Every piece is tokenized by itself, as Pack.score does with continuations. So later pieces change neither the tokens
    of a piece nor the weights computed from it.

    Args:
        members: the members.
        pieces: the pieces of the text; none is empty.
        keep: keep hidden states, for weightings and pools that need logits.
        prefixes: a cache of earlier readings, from which this one may start, and in which it is stored.

    Attributes:
        seconds: duration of each member's pass.

    Raises:
        ContextOverflowError: the text is too long for a member.
    """

    def __init__(
        self,
        members: Sequence[Member],
        pieces: Sequence[str],
        keep: bool = True,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self._members = members
        self._ends = list(accumulate(map(len, pieces)))
        self._text = "".join(pieces)
        self._encoded: list[Encoded] = []
        self._counts: list[list[int]] = []  # scored tokens of each member in the first pieces
        self._logprobs: list[Tensor] = []
        self._lines: list[Line] = []
        self.seconds: list[float] = []
        for member in members:
            encoded, counts = encode_pieces(member.encoder, pieces)
            if member.context_window and len(encoded.ids) > member.context_window:
                raise ContextOverflowError(member.name, member.context_window, len(encoded.ids), 0)
            self._encoded.append(encoded)
            self._counts.append(counts)
        try:
            for member, encoded in zip(members, self._encoded, strict=True):
                started = time.perf_counter()
                sequence = member.open(prefixes)
                if keep and isinstance(sequence.engine, KeepsHidden):
                    sequence.engine.keep_hidden(sequence)
                lines, scores, failed = open_lines({0: (sequence, member, encoded.ids, encoded.positions)})
                if failed:
                    raise failed[0]
                self._lines.append(lines[0])
                self._logprobs.append(scores[0])
                self.seconds.append(time.perf_counter() - started)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the caches."""
        for line in self._lines:
            line.close()

    def weights(self, options: Options, members: Sequence[int], pieces: int = 1) -> Weights:
        """Weights over these members, in this order, from the first `pieces` pieces: as Pack.weigh's, with members
        below `min_weight` dropped."""
        tokens = [self._slice(k, 0, pieces) for k in members]
        weights = weights_of(
            [self._members[k] for k in members],
            [self._lines[k].sequence for k in members],
            [encoded for encoded, _ in tokens],
            [logprobs for _, logprobs in tokens],
            options,
        )
        return drop_small(weights, options.min_weight)

    def nll(self, chosen: Sequence[tuple[Sequence[int], Weights]], first: int, last: int) -> list[float]:
        """NLL in nats of the pieces first..last-1 (first ≥ 1), given all pieces before them, under several packs.

        Tokens are fused if a pack's members split the text alike, otherwise words (linear pool).

        Args:
            chosen: (members, weights over them) of each pack.
            first, last: the range of pieces.
        """
        members_of = [_running(members, weights) for members, weights in chosen]
        results: list[float | None] = [None] * len(chosen)
        of_log_pool: dict[Hashable, list[int]] = {}  # packs of the log pool, grouped by those that one pass can serve
        for at, ((_, weights), (members, values)) in enumerate(zip(chosen, members_of, strict=True)):
            parts = [scored(*self._slice(k, first, last)) for k in members]
            common = self._common(members, parts)
            if weights.pool == "log" and len(members) > 1 and common is not None:
                sizes = {self._members[k].vocabulary_size for k in members}
                one = self._members[members[0]].vocabulary.fingerprint
                of_log_pool.setdefault((one, *sizes) if len(sizes) == 1 else tuple(members), []).append(at)
                continue
            results[at] = -mixture(self.spans(first, last), parts, common, values)
        for packs in of_log_pool.values():
            union = sorted({k for at in packs for k in members_of[at][0]})
            points = [[dict(zip(*members_of[at], strict=True)).get(k, 0.0) for k in union] for at in packs]
            for at, total in zip(packs, self._log_pool(union, points, first, last), strict=True):
                results[at] = total
        return [result for result in results if result is not None]

    def counts(self, member: int, first: int, last: int) -> int:
        """Scored tokens of a member in the pieces first..last-1."""
        counts = self._counts[member]
        return counts[last] - counts[first]

    def spans(self, first: int, last: int) -> str:
        """The text of the pieces first..last-1."""
        return self._text[self._start(first) : self._ends[last - 1]]

    def fused(self, weights: Weights) -> Iterator[Tensor]:
        """The fused distributions of all members before each of the last tokens that all of them score: float32 (b, V)
        log-probabilities in the first member's ids, in blocks.

        Raises:
            DataError: the members do not split the text alike.
        """
        all_members, last = range(len(self._members)), len(self._ends)
        running, values = _running(all_members, weights)
        shared = shared_by(self._members)
        parts = [scored(*self._slice(k, 0, last)) for k in all_members]
        if shared is not None:
            parts = [replace(part, ids=shared.first(k, part.ids)) for k, part in enumerate(parts)]
        if common_tokens(parts) is None:
            raise DataError("the members do not split the text into the same tokens; leave it out")
        count = min(counts[last] for counts in self._counts)
        if not count:
            raise DataError("the text has no token that all members predict; give longer texts")
        skip = [counts[last] - count for counts in self._counts]
        sequences = [line.sequence for line in self._lines]
        source = source_of(self._members, sequences, self._encoded, skip, count, shared)
        for _, block in source.blocks(torch.arange(count), running):
            yield fuse(block.log_softmax(-1), values, weights.pool)

    def options(self, texts: Sequence[str], chosen: Sequence[tuple[Sequence[int], Weights]]) -> list[list[float]]:
        """Log-likelihood in nats of each text as the continuation of the whole reading, under several packs."""
        running = [_running(members, weights) for members, weights in chosen]
        results: list[list[float]] = [[] for _ in chosen]
        used = sorted({k for members, _ in running for k in members})
        need_rows = {
            k
            for (members, _), (_, weights) in zip(running, chosen, strict=True)
            if weights.pool == "log"
            for k in members
        }
        ids = {k: [self._members[k].encoder.continuation(text) for text in texts] for k in used}
        for begin in range(0, len(texts), TOGETHER):
            results_ = self._given({k: ids[k][begin : begin + TOGETHER] for k in used}, need_rows)
            for at, text in enumerate(texts[begin : begin + TOGETHER]):
                parts = {}
                for k in used:
                    tokens = ids[k][begin + at]
                    starts, ends = offsets(self._members[k].encoder, tokens, text)
                    parts[k] = Scored(tokens, starts, ends, list(range(len(tokens))), results_[k][at][0])
                for result, (members, values), (_, weights) in zip(results, running, chosen, strict=True):
                    common = self._common(members, [parts[k] for k in members])
                    if weights.pool == "log" and len(members) > 1 and common is not None:
                        size = min(results_[k][at][1].shape[-1] for k in members)
                        fused = fuse(torch.stack([results_[k][at][1][:, :size] for k in members]), values, "log")
                        target = torch.tensor(ids[members[0]][begin + at])[:, None]
                        result.append(float(fused.gather(-1, target).double().sum()))
                        continue
                    result.append(mixture(text, [parts[k] for k in members], common, values))
        return results

    def _given(self, rows: dict[int, list[list[int]]], whole: set[int]) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """Members' scores of continuations of the reading, read in common passes: float64 (n,) of the ids; and for
        members in `whole` the distributions, float32 (n, V)."""
        scores = score_rows(dict(enumerate(self._lines)), {k: rows[k] for k in rows if k not in whole})
        results = {k: [(logprobs, torch.empty(0)) for logprobs in scores[k]] for k in scores}
        slots = {(k, at): ids[:-1] for k in rows if k in whole for at, ids in enumerate(rows[k])}
        forks = {(k, at): self._lines[k].fork() for k, at in slots}
        try:
            answers = read_lines(forks, {slot: ids for slot, ids in slots.items() if ids})
        finally:
            for fork in forks.values():
                fork.close()
        for k, at in slots:
            first_row = self._lines[k].next_logprobs[None]
            answer = answers.get((k, at), first_row[:0])
            if isinstance(answer, MemberError):
                raise answer
            after, ids = torch.cat([first_row, answer]).cpu(), rows[k][at]
            results.setdefault(k, []).append((after.gather(-1, torch.tensor(ids)[:, None])[:, 0].double(), after))
        return results

    def _log_pool(
        self, members: Sequence[int], values: Sequence[Sequence[float]], first: int, last: int
    ) -> list[float]:
        """NLL of the pieces in the log pool under several weights; one pass over the logits."""
        begin = min(self._counts[k][first] for k in members)
        skip = [self._counts[k][first] - begin for k in members]
        encoded, total = self._encoded[members[0]], self._counts[members[0]][last] - skip[0]
        source = source_of(
            [self._members[k] for k in members],
            [self._lines[k].sequence for k in members],
            [self._encoded[k] for k in members],
            skip,
            total,
        )
        targets = torch.tensor([encoded.ids[at] for at in encoded.positions[skip[0] :][:total]])
        points = torch.tensor(values)
        indices = range(len(members))
        losses = [grid_losses(points.to(m), m) for m in margins(source, targets, indices, torch.arange(begin, total))]
        return torch.stack(losses).sum(0).nan_to_num(math.inf).tolist()

    def _common(self, members: Sequence[int], parts: Sequence[Scored]) -> list[Scored] | None:
        first = self._members[members[0]].vocabulary
        if not all(self._members[k].vocabulary.akin(first) for k in members[1:]):
            return None
        return common_tokens(parts)

    def _start(self, piece: int) -> int:
        return self._ends[piece - 1] if piece else 0

    def _slice(self, member: int, first: int, last: int) -> tuple[Encoded, Tensor]:
        """The scored tokens of the pieces first..last-1, with offsets in the text of these pieces."""
        encoded, counts, begin = self._encoded[member], self._counts[member], self._start(first)
        part = slice(counts[first], counts[last])
        return (
            Encoded(
                encoded.ids,
                self.spans(first, last),
                encoded.positions[part],
                [start - begin for start in encoded.starts[part]],
                [end - begin for end in encoded.ends[part]],
            ),
            self._logprobs[member][part],
        )


def _running(members: Sequence[int], weights: Weights) -> tuple[list[int], list[float]]:
    """The members with a weight other than 0, and their weights."""
    weighted = [(k, value) for k, value in zip(members, weights.values, strict=True) if value != 0]
    return [k for k, _ in weighted], [value for _, value in weighted]


def mixture(text: str, parts: Sequence[Scored], common: Sequence[Scored] | None, values: Sequence[float]) -> float:
    """Log-likelihood in nats under the linear pool, of the common tokens, or, without any, of the words of `text`."""
    matrix = torch.stack([p.logprobs for p in common]) if common is not None else common_words(text, parts)[0]
    return float((matrix + torch.tensor(values, dtype=torch.float64).log()[:, None]).logsumexp(0).sum())


def encode_pieces(encoder: Encoder, pieces: Sequence[str]) -> tuple[Encoded, list[int]]:
    """A text's tokens, each piece tokenized by itself; and the number of scored tokens in the first 0, 1, ...
    pieces."""
    first_piece = encoder.encode(check(pieces[0], chat_template=False))
    ids, positions = list(first_piece.ids), list(first_piece.positions)
    starts, ends, counts = list(first_piece.starts), list(first_piece.ends), [0, len(first_piece.positions)]
    begin = len(pieces[0])
    for piece in pieces[1:]:
        piece_ids = encoder.continuation(piece)
        first, last = offsets(encoder, piece_ids, piece)
        positions += range(len(ids), len(ids) + len(piece_ids))
        ids += piece_ids
        starts += [begin + at for at in first]
        ends += [begin + at for at in last]
        counts.append(len(positions))
        begin += len(piece)
    return Encoded(ids, "".join(pieces), positions, starts, ends), counts


def offsets(encoder: Encoder, ids: Sequence[int], text: str) -> tuple[list[int], list[int]]:
    """Character offsets of a continuation's tokens in its text; the bytes of one character share its offsets. If the
    tokenizer changes the text, all tokens span all of it."""
    sizes = [len(encoder.vocabulary.text_bytes(i)) for i in ids]
    stops = list(accumulate(sizes))
    if b"".join(map(encoder.vocabulary.text_bytes, ids)) != text.encode():
        return [0] * len(ids), [len(text)] * len(ids)
    characters = list(accumulate((len(c.encode()) for c in text), initial=0))  # byte offset of each character
    starts = [bisect_right(characters, stop - size) - 1 for stop, size in zip(stops, sizes, strict=True)]
    return starts, [bisect_right(characters, stop - 1) for stop in stops]


def cut_after(encoder: Encoder, text: str, tokens: int) -> int:
    """The end of a prompt of about `tokens` tokens in a text: the next end of a word, before the space."""
    ends = encoder.encode(text).ends
    at = ends[min(tokens, len(ends)) - 1] if ends else 0
    limit = min(len(text), at + 80)
    for stop in range(at, limit):
        if text[stop].isspace() and not text[stop - 1 : stop].isspace():
            return stop
    for stop in range(at, limit):  # a script without spaces, or one very long word
        if is_word_boundary(text, stop):
            return stop
    return limit
