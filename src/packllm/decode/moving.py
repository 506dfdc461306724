"""A row's weights while they move: what `adapt`, `sleep` and `weight_path` do to one answer (METHODS §3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from packllm.errors import OptionError
from packllm.options import Options
from packllm.weights import find
from packllm.weights.adaptive import Adaptive
from packllm.weights.result import Pool, Weights

SEGMENT = 16
"""Tokens that one row of a path stands for."""

BLOCK = 8
"""Tokens that a sleeping member skips, and then reads in one pass."""


class Moving:
    """What an answer has taught so far.

    Args:
        weights: found on the prompt; a distribution.
        path: keep the weights of every segment.

    Attributes:
        asleep: indices of the members that do not run in this block.
        unread: the tokens that these have yet to read.
    """

    def __init__(self, weights: Weights, path: bool = False) -> None:
        self._start, self._filter, self._count = weights.values, Adaptive(weights), 0
        self._lost: set[int] = set()
        self._path: list[tuple[float, ...]] | None = [] if path else None
        self.asleep: set[int] = set()
        self.unread: list[int] = []
        self.sleep(weights, 0.0)

    def fork(self) -> Moving:
        """The same once more; this one stays as it is."""
        twin = copy.copy(self)
        twin._filter, twin.unread, twin._block = self._filter.fork(), list(self.unread), list(self._block)
        twin._path = None if self._path is None else list(self._path)
        return twin

    def observe(self, weights: Weights, given: Mapping[int, float], tokens: Sequence[int] = (0,)) -> Weights:
        """Something was chosen: a token, or a segment of several.

        Args:
            weights: the row's; members at 0 are lost.
            given: by member, the probability that it gave that, or numbers in proportion to them. Who is not named
                had no say, and is judged neither way.
            tokens: what was chosen.

        Returns:
            The weights of what comes next.
        """
        for _ in tokens:
            if self._path is not None and self._count % SEGMENT == 0:
                self._path.append(weights.values)
            self._count += 1
        self._learn(weights, given)
        if self._threshold:
            self._block.append((tokens[0], given))
            self.unread += tokens
        return self._told(weights)

    def _learn(self, weights: Weights, given: Mapping[int, float]) -> None:
        lost = {k for k, value in enumerate(weights.values) if not value}
        if lost != self._lost:
            self._lost = lost
            self._filter.lose(lost)
        mean = 0.0
        if len(given) < len(weights.values) - len(lost):
            believed = self._filter.weights()
            total = sum(believed[k] for k in given)
            mean = sum(believed[k] * p for k, p in given.items()) / total if total else 1.0
        self._filter.observe([given.get(k, mean) for k in range(len(weights.values))])

    def _told(self, weights: Weights) -> Weights:
        path = None if self._path is None else tuple(self._path)
        return replace(weights, values=tuple(self._filter.weights().tolist()), start=self._start, path=path)

    # Sleeping

    def sleep(self, weights: Weights, below: float) -> None:
        """From now on members below this weight at a block's start do not run in it; 0: all run."""
        self._threshold = below
        self._new_block(weights)

    @property
    def room(self) -> int:
        """Tokens to the end of the block."""
        return BLOCK - self._count % BLOCK if self._threshold else 2**31

    @property
    def ends(self) -> bool:
        """Whether a block is over."""
        return bool(self._block) and self._count % BLOCK == 0

    def wake(self, weights: Weights, heard: Mapping[int, Tensor], anew: bool) -> Weights:
        """The members that slept have read on: the block is learnt again, from all.

        Args:
            weights: the row's.
            heard: by member that slept, its log-probabilities (n, V_k) at the last n places, which hold the block's.
            anew: who is below the threshold now sleeps through the next block.

        Returns:
            The weights of what comes next.
        """
        if heard:
            self._filter, size = self._before, len(self._block)
            self._lost = {k for k, value in enumerate(weights.values) if not value}
            self._filter.lose(self._lost)
            rows = {k: logprobs[len(logprobs) - size :] for k, logprobs in heard.items()}
            for at, (token, given) in enumerate(self._block):
                self._learn(weights, {**given, **{k: math.exp(float(row[at, token])) for k, row in rows.items()}})
            weights = self._told(weights)
        self.unread = self.unread[-1:]
        self._new_block(weights)
        if not anew:
            self.asleep = set()
        return weights

    def _new_block(self, weights: Weights) -> None:
        self._block: list[tuple[int, Mapping[int, float]]] = []
        self._before = self._filter.fork()
        most = max(weights.values)
        self.asleep = {k for k, value in enumerate(weights.values) if 0 < value < min(self._threshold, most)}


def adapts(options: Options) -> bool:
    """Whether weights move: where they are told to, and else where they are a mixture found on the prompt."""
    if options.adapt is not None:
        return options.adapt
    return _pool(options) == "linear" and not isinstance(options.weighting, dict) and options.weighting != "uniform"


def _pool(options: Options) -> Pool:
    return options.pool or ("linear" if isinstance(options.weighting, dict) else find(options.weighting).pool)


def check_moving(options: Options) -> None:
    """OptionError where the weights are told to move and cannot, or members to sleep though nothing moves."""
    if options.adapt and _pool(options) == "log":
        raise OptionError(
            f"adapt=True moves the weights of a mixture, and weighting={options.weighting!r} fuses in the logarithmic "
            f"pool, whose weights are no probabilities of members; use pool='linear' or adapt=False"
        )
    if options.sleep and not adapts(options):
        raise OptionError(f"sleep={options.sleep} needs weights that move, or nobody would wake; add adapt=True")


def moving(options: Options, weights: Weights) -> Moving | None:
    """What moves a row's weights; None where they stay."""
    if not adapts(options) or sum(value != 0 for value in weights.values) < 2:
        return None
    return Moving(weights, options.weight_path)
