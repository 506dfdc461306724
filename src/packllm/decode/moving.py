"""Adaptive weights of one answer: the options `adapt`, `sleep` and `weight_path` (METHODS §3)."""

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
"""Tokens between two rows of a weight path."""

BLOCK = 8
"""Tokens that a sleeping member skips and then reads in one pass."""


class Moving:
    """The adaptive weights of one answer, learnt from its tokens so far.

    Args:
        weights: the prompt's weights; a distribution.
        path: record the weights of every segment.

    Attributes:
        asleep: indices of the members that do not run in this block.
        unread: the tokens that they have yet to read.
    """

    def __init__(self, weights: Weights, path: bool = False) -> None:
        self._start, self._filter, self._count = weights.values, Adaptive(weights), 0
        self._lost: set[int] = set()
        self._path: list[tuple[float, ...]] | None = [] if path else None
        self.asleep: set[int] = set()
        self.unread: list[int] = []
        self.sleep(weights, 0.0)

    def fork(self) -> Moving:
        """A copy that adapts independently of this one."""
        twin = copy.copy(self)
        twin._filter, twin.unread, twin._block = self._filter.fork(), list(self.unread), list(self._block)
        twin._path = None if self._path is None else list(self._path)
        return twin

    def observe(self, weights: Weights, likelihoods: Mapping[int, float], tokens: Sequence[int] = (0,)) -> Weights:
        """Update the weights by Bayes' rule after a chosen token, or a segment of several.

        Args:
            weights: the row's weights; members at 0 have been dropped.
            likelihoods: by member, the probability that it gave to the chosen tokens, or numbers proportional to it. A
                member that is missing here keeps its share.
            tokens: the chosen tokens.

        Returns:
            The weights for what comes next.
        """
        for _ in tokens:
            if self._path is not None and self._count % SEGMENT == 0:
                self._path.append(weights.values)
            self._count += 1
        self._learn(weights, likelihoods)
        if self._threshold:
            self._block.append((tokens[0], likelihoods))
            self.unread += tokens
        return self._updated(weights)

    def _learn(self, weights: Weights, likelihoods: Mapping[int, float]) -> None:
        dropped = {k for k, value in enumerate(weights.values) if not value}
        if dropped != self._lost:
            self._lost = dropped
            self._filter.lose(dropped)
        mean = 0.0
        if len(likelihoods) < len(weights.values) - len(dropped):
            current = self._filter.weights()
            total = sum(current[k] for k in likelihoods)
            mean = sum(current[k] * p for k, p in likelihoods.items()) / total if total else 1.0
        self._filter.observe([likelihoods.get(k, mean) for k in range(len(weights.values))])

    def _updated(self, weights: Weights) -> Weights:
        path = None if self._path is None else tuple(self._path)
        return replace(weights, values=tuple(self._filter.weights().tolist()), start=self._start, path=path)

    # Sleeping

    def sleep(self, weights: Weights, below: float) -> None:
        """From now on, members with less weight than `below` at the start of a block do not run in it; 0: all run."""
        self._threshold = below
        self._new_block(weights)

    @property
    def room(self) -> int:
        """Tokens until the end of the block."""
        return BLOCK - self._count % BLOCK if self._threshold else 2**31

    @property
    def ends(self) -> bool:
        """Whether a block ends here."""
        return bool(self._block) and self._count % BLOCK == 0

    def wake(self, weights: Weights, slept: Mapping[int, Tensor], again: bool) -> Weights:
        """Update the weights again over the last block, now with the members that slept.

        Args:
            weights: the row's weights.
            slept: log-probabilities (n, V_k) of each member that slept, at the last n positions; these include the
                block's.
            again: whether members below the threshold sleep through the next block.

        Returns:
            The weights for what comes next.
        """
        if slept:
            self._filter, size = self._before, len(self._block)
            self._lost = {k for k, value in enumerate(weights.values) if not value}
            self._filter.lose(self._lost)
            rows = {k: logprobs[len(logprobs) - size :] for k, logprobs in slept.items()}
            for at, (token, likelihoods) in enumerate(self._block):
                self._learn(weights, {**likelihoods, **{k: math.exp(float(row[at, token])) for k, row in rows.items()}})
            weights = self._updated(weights)
        self.unread = self.unread[-1:]
        self._new_block(weights)
        if not again:
            self.asleep = set()
        return weights

    def _new_block(self, weights: Weights) -> None:
        self._block: list[tuple[int, Mapping[int, float]]] = []
        self._before = self._filter.fork()
        most = max(weights.values)
        self.asleep = {k for k, value in enumerate(weights.values) if 0 < value < min(self._threshold, most)}


def adapts(options: Options) -> bool:
    """Whether weights adapt: if `adapt` says so; by default if they are a mixture computed from the prompt."""
    if options.adapt is not None:
        return options.adapt
    return _pool(options) == "linear" and not isinstance(options.weighting, dict) and options.weighting != "uniform"


def _pool(options: Options) -> Pool:
    return options.pool or ("linear" if isinstance(options.weighting, dict) else find(options.weighting).pool)


def check_moving(options: Options) -> None:
    """Raise OptionError where adapt=True is impossible, or members are to sleep although weights do not adapt."""
    if options.adapt and _pool(options) == "log":
        raise OptionError(
            f"adapt=True adapts the weights of a mixture, but weighting={options.weighting!r} fuses in the logarithmic "
            f"pool, whose weights are no probabilities of members; use pool='linear' or adapt=False"
        )
    if options.sleep and not adapts(options):
        raise OptionError(f"sleep={options.sleep} needs adaptive weights, or no member would wake; add adapt=True")


def moving(options: Options, weights: Weights) -> Moving | None:
    """The adaptive weights of a row; None if they do not adapt."""
    if not adapts(options) or sum(value != 0 for value in weights.values) < 2:
        return None
    return Moving(weights, options.weight_path)
