"""Racing prefill: members that predict the first part of a prompt too badly to matter stop reading it (METHODS §3)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from packllm.chat.prompt import Encoded
from packllm.engines import base
from packllm.engines.base import Read, read_together
from packllm.engines.member import Member
from packllm.errors import OptionError
from packllm.options import Options
from packllm.weights import em
from packllm.weights.common import in_common

CONFIDENCE = 3.09
"""Standard errors by which the text read must speak against a weight as large as the threshold: 99.9 %, one-sided, were
the rest of the text like what was read."""

FEWEST = 32
"""Tokens or words that standard errors are taken of at the least."""

Slot = tuple[int, int]


def check_race(options: Options) -> None:
    """Raise OptionError where the weights are not those of `em`, or have a prior."""
    if options.race and options.weighting != "em":
        raise OptionError(
            f"race={options.race} stops members by the posterior weights of 'em', which weighting="
            f"{options.weighting!r} does not use; use weighting='em' or race=0"
        )
    if options.race and options.prior is not None:
        raise OptionError(f"race={options.race} ignores the prior and could stop a member that it favours; use race=0")


class Race:
    """Prompts that are read in chunks; after each chunk members may stop.

    Args:
        going: by (member, prompt): a new sequence, its member and the prompt to read. A sequence that stops or fails is
            closed and removed.

    Attributes:
        going: as above.
        scores: float64 (n,), log-probabilities of the scored tokens that were read.
    """

    def __init__(self, going: Mapping[Slot, tuple[base.Sequence, Member, Encoded]]) -> None:
        self.going = dict(going)
        self.scores = {slot: torch.empty(0, dtype=torch.float64) for slot in going}

    def scores_with(self, slot: Slot, later: Tensor) -> Tensor:
        """float64, the scores of the whole prompt; `later` are those of the tokens read after the race."""
        return torch.cat([self.scores[slot], later])

    def run(self, chunk: int, minimum: float) -> dict[Slot, Exception]:
        """Read until each prompt has one member left, or less than a chunk to read. Chunks grow: each is as long as all
        before it, because passes over few tokens cost more by the token.

        Args:
            chunk: scored tokens of the first chunk, counted in the tokens of a prompt's first member.
            minimum: members that cannot reach this weight stop; 0: nothing is read and no member stops.

        Returns:
            The errors of the members that failed.
        """
        failed: dict[Slot, Exception] = {}
        tokens_read = 0
        while minimum > 0:
            tokens_read = 2 * tokens_read or chunk
            counts: dict[Slot, int] = {}
            for row in {r for _, r in self.going}:
                slots = self._slots(row)
                ends = self.going[slots[0]][2].ends
                if len(slots) > 1 and len(ends) > tokens_read:
                    counts |= {slot: bisect_right(self.going[slot][2].ends, ends[tokens_read - 1]) for slot in slots}
            if not counts:
                break
            failed |= self._read(counts)
            for row in {r for _, r in counts}:
                self._stop(self._slots(row), minimum)
        return failed

    def _slots(self, row: int) -> list[Slot]:
        return [slot for slot in self.going if slot[1] == row]

    def _read(self, counts: Mapping[Slot, int]) -> dict[Slot, Exception]:
        """Read on until `counts` scored tokens are known."""
        reads, targets = {}, {}
        for slot, count in counts.items():
            sequence, _, encoded = self.going[slot]
            start, stop = len(sequence.ids), encoded.positions[count - 1] if count else 0
            if stop > start:
                targets[slot] = [-1] * (stop - start)
                for at in encoded.positions[len(self.scores[slot]) : count]:
                    targets[slot][at - start - 1] = encoded.ids[at]
                reads[slot] = Read(sequence, encoded.ids[start:stop], targets[slot])
        failed = {}
        for slot, answer in zip(reads, read_together(list(reads.values())), strict=True):
            if isinstance(answer, Exception):
                failed[slot] = answer
                self.going.pop(slot)[0].close()
            else:
                is_target = torch.tensor(targets[slot]) >= 0
                self.scores[slot] = torch.cat([self.scores[slot], answer[is_target]])
        return failed

    def _stop(self, slots: Sequence[Slot], minimum: float) -> None:
        if len(slots) < 2:
            return
        scores = [self.scores[slot] for slot in slots]
        parts = [_first(self.going[slot][2], len(values)) for slot, values in zip(slots, scores, strict=True)]
        common = in_common([self.going[slot][1] for slot in slots], parts, scores)
        for at in hopeless(common.matrix.numpy(), minimum):
            self.going.pop(slots[at])[0].close()


def _first(encoded: Encoded, count: int) -> Encoded:
    """A prompt up to its `count`-th scored token."""
    end = encoded.ends[count - 1] if count else 0
    cut = slice(0, count)
    return replace(
        encoded,
        text=encoded.text[:end],
        positions=encoded.positions[cut],
        starts=encoded.starts[cut],
        ends=encoded.ends[cut],
    )


def hopeless(logprobs: np.ndarray, minimum: float) -> list[int]:
    """Members whose `em` weight is below a threshold with near certainty.

    The likelihood, as a function of member k's weight with the others at their best, is concave. So where its slope at
    the threshold is negative, its maximum is below. The slope is a mean over tokens, and so has a standard error.

    Args:
        logprobs: (K, t), the members' log-probabilities of the tokens or words so far.
        minimum: the threshold.

    Returns:
        Indices; never that of the member with the largest weight.
    """
    seen = logprobs[:, np.isfinite(logprobs.max(axis=0, initial=-np.inf))]
    if minimum <= 0 or seen.shape[1] < FEWEST:
        return []
    best, weights = int(np.argmax(em(seen))), np.array(em(seen, alpha=0.0))
    scaled, found = np.exp(seen - seen.max(axis=0)), []
    for k in np.flatnonzero(weights < minimum).tolist():
        if k == best:
            continue
        others = np.delete(weights, k)
        rest = others / others.sum() @ np.delete(scaled, k, axis=0)
        slope = (scaled[k] - rest) / np.maximum((1 - minimum) * rest + minimum * scaled[k], 1e-300)
        if slope.mean() + CONFIDENCE * slope.std(ddof=1) / np.sqrt(len(slope)) < 0:
            found.append(k)
    return found
