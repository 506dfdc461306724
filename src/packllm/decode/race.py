"""Racing prefill: members that explain the first part of a prompt too badly to count stop reading it (METHODS §3)."""

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

EVIDENCE = 2.71
"""Nats by which the text read must speak against a weight as large as the threshold: a likelihood ratio that chance
reaches once in a hundred times, were the rest of the text like what was read."""

Slot = tuple[int, int]


def check_race(options: Options) -> None:
    """OptionError where members would race for something else than weights of `em`."""
    if options.race and options.weighting != "em":
        raise OptionError(
            f"race={options.race} stops members by the posterior weights of 'em', which weighting="
            f"{options.weighting!r} does not use; use weighting='em' or race=0"
        )
    if options.race and options.prior is not None:
        raise OptionError(f"race={options.race} goes by the text alone and would drop whom a prior keeps; use race=0")


class Race:
    """Prompts, read in chunks, after each of which members may stop.

    Args:
        going: by (member, prompt), new sequences, whose they are and what they read; those that stop or fail are closed
            and leave.

    Attributes:
        going: as given.
        scores: float64 (n,), log-probabilities of the n scored tokens so far.
    """

    def __init__(self, going: Mapping[Slot, tuple[base.Sequence, Member, Encoded]]) -> None:
        self.going = dict(going)
        self.scores = {slot: torch.empty(0, dtype=torch.float64) for slot in going}

    def scores_with(self, slot: Slot, later: Tensor) -> Tensor:
        """float64, the scores of the whole prompt, of what came after the race."""
        return torch.cat([self.scores[slot], later])

    def run(self, chunk: int, minimum: float) -> dict[Slot, Exception]:
        """Read until in each prompt one member or less than a chunk is left.

        Args:
            chunk: scored tokens, in those of a prompt's first member.
            minimum: the weight that a member has to be able to reach; at 0 nothing is read, and nobody stops.

        Returns:
            What failed.
        """
        failed: dict[Slot, Exception] = {}
        reached = 0
        while minimum > 0:
            reached += chunk
            counts: dict[Slot, int] = {}
            for row in {r for _, r in self.going}:
                slots = self._slots(row)
                ends = self.going[slots[0]][2].ends
                if len(slots) > 1 and len(ends) > reached:
                    counts |= {slot: bisect_right(self.going[slot][2].ends, ends[reached - 1]) for slot in slots}
            if not counts:
                break
            failed |= self._read(counts)
            for row in {r for _, r in counts}:
                self._stop(self._slots(row), minimum)
        return failed

    def _slots(self, row: int) -> list[Slot]:
        return [slot for slot in self.going if slot[1] == row]

    def _read(self, counts: Mapping[Slot, int]) -> dict[Slot, Exception]:
        """Read until so many scored tokens are known."""
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
                wanted = torch.tensor(targets[slot]) >= 0
                self.scores[slot] = torch.cat([self.scores[slot], answer[wanted]])
        return failed

    def _stop(self, slots: Sequence[Slot], minimum: float) -> None:
        if len(slots) < 2:
            return
        scores = [self.scores[slot] for slot in slots]
        parts = [_first(self.going[slot][2], len(given)) for slot, given in zip(slots, scores, strict=True)]
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
    """Members whose weight of `em` is surely below a threshold.

    With weight u for member k and the rest for the best mixture of the others, the likelihood f(u) is concave. So if
    f(0) - f(minimum) is as much as EVIDENCE, every weight from `minimum` on is as unlikely.

    Args:
        logprobs: (K, t), what the members gave the tokens or words so far.
        minimum: the threshold.

    Returns:
        Indices; never the member of the largest weight.
    """
    seen = logprobs[:, np.isfinite(logprobs.max(axis=0, initial=-np.inf))]
    if minimum <= 0 or not seen.shape[1]:
        return []
    best, found = int(np.argmax(em(seen))), []
    scaled = np.exp(seen - seen.max(axis=0))
    for k in range(len(seen)):
        if k == best:
            continue
        others = np.delete(scaled, k, axis=0)
        rest = np.array(em(np.log(np.maximum(others, 1e-300)), alpha=0.0)) @ others
        within = (1 - minimum) * rest + minimum * scaled[k]
        if np.log(np.maximum(rest, 1e-300) / np.maximum(within, 1e-300)).sum() >= EVIDENCE:
            found.append(k)
    return found
