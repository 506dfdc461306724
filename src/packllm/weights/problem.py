"""The input of a weighting: how well each member predicted one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from packllm.errors import MemberError, WeightsError
from packllm.options import Options
from packllm.weights.result import Pool


class LogitSource(Protocol):
    """Next-token logits of K members at the t scored positions of one prompt; they come in blocks, never all at
    once."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, t, V)."""
        ...

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits in blocks. May be called several times; each call computes them again.

        Args:
            positions: int64, ascending, from 0..t-1.
            members: indices of members, in the order of the result; None: all.

        Yields:
            Part of the positions, (b,), and their logits, float32 (K, b, V). A block may be overwritten by the next
            one, and by the caller.
        """
        ...


@runtime_checkable
class SharedHeadSource(LogitSource, Protocol):
    """A LogitSource of members with a common LM head: s_k = W h_k for hidden states h_k. Then Σ_k λ_k s_k = W Σ_k λ_k
    h_k and E_p s_k = h_k · Wᵀp, so two matrix products replace K."""

    def losses(
        self, weights: np.ndarray, positions: Tensor, targets: Tensor, members: Sequence[int]
    ) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        """The loss of the pool of `members` under `weights`, part by part.

        Args:
            weights: λ of `members`.
            positions: int64, in any order.
            targets: int64 (t,), the observed tokens.
            members: indices of the members.

        Yields:
            The loss −log p(x), float32 (b,), and a function from rows (m,) of this part to the gradient
            E_p s_k − s_k(x), float32 (len(members), m); it is valid until the next part.
        """
        ...


class Problem:
    """The scores of one prompt.

    Args:
        names: the members' names.
        logprobs: float64 (K, t), log p_k of each observed token (or word). None: computed from the source when needed,
            or provided by a weighting that has read the logits.
        nll: float64 (K,), each member's mean NLL in the common unit (METHODS §2). None: the sum of -logprobs over
            `units`.
        source: the logits, for the log-pool optimisers; None if the members share no tokens.
        targets: int64 (t,), the observed tokens; None without `source`.
        text: the scored text, for weightings that use it; None if there are only logits.
        units: the number of units of the text; None: as many as observed tokens.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        logprobs: Tensor | None = None,
        nll: Tensor | None = None,
        source: LogitSource | None = None,
        targets: Tensor | None = None,
        text: str | None = None,
        units: int | None = None,
    ) -> None:
        self.names, self.source, self.targets, self.text = names, source, targets, text
        self._logprobs, self._nll, self._units = logprobs, nll, units

    @property
    def scored(self) -> int:
        """t, the number of columns of `logprobs`."""
        return len(self.targets) if self._logprobs is None and self.targets is not None else self.logprobs.shape[1]

    @property
    def logprobs(self) -> Tensor:
        """float64 (K, t), log p_k of each observed token (or word)."""
        if self._logprobs is None:
            source, targets = self.logits("em")
            self.provide_logprobs(observed_logprobs(source, targets))
        assert self._logprobs is not None
        return self._logprobs

    @property
    def nll(self) -> Tensor:
        """float64 (K,), each member's mean NLL per unit."""
        if self._nll is not None:
            return self._nll
        return -self.logprobs.sum(1) / max(self._units or self.scored, 1)

    def provide_logprobs(self, logprobs: Tensor) -> None:
        """Provide `logprobs`, by a weighting that has read all logits; ignored if they are known."""
        self.check(logprobs)
        if self._logprobs is None:
            self._logprobs = logprobs

    def check(self, logprobs: Tensor) -> None:
        """Raise MemberError for the first member with a NaN in `logprobs` (K, ...), a sign of invalid logits."""
        for name, faulty in zip(self.names, logprobs.isnan().flatten(1).any(1).tolist(), strict=True):
            if faulty:
                raise MemberError(name, "its logits are not finite (NaN or infinity)")

    def logits(self, strategy: str) -> tuple[LogitSource, Tensor]:
        """`source` and `targets`; raise WeightsError if there are none."""
        if self.source is None or self.targets is None:
            raise WeightsError(
                f"weighting={strategy!r} needs members that split the scored text into the same tokens of one "
                f"vocabulary; use weighting='em', 'sim' or 'top1' for this pack, or decoding='mined', which maps "
                f"different vocabularies"
            )
        return self.source, self.targets


@dataclass(frozen=True)
class Solution:
    """Weights in member order, with their NLL and gap if the weighting computes them (see Weights)."""

    values: tuple[float, ...]
    fused_nll: float | None = None
    gap: float | None = None


@dataclass(frozen=True)
class Weighting:
    """One strategy.

    Attributes:
        pool: the pool that its weights are for.
        solve: the function that computes the weights.
        needs_logits: whether it reads logits; the prefill then keeps what is needed to compute them again.
        takes: names of the options that it reads; it ignores all others.
    """

    pool: Pool
    solve: Callable[[Problem, Options], Solution]
    needs_logits: bool = False
    takes: tuple[str, ...] = ()


class TensorSource:
    """A LogitSource over a tensor.

    Args:
        logits: (K, t, V), any float type.
        block: positions per block.
    """

    def __init__(self, logits: Tensor, block: int = 64) -> None:
        self._logits, self._block = logits, block

    @property
    def shape(self) -> tuple[int, int, int]:
        members, positions, vocabulary = self._logits.shape
        return members, positions, vocabulary

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for part in positions.split(self._block):
            block = self._logits[:, part]
            yield part, (block if members is None else block[list(members)]).float()


def observed_logprobs(source: LogitSource, targets: Tensor) -> Tensor:
    """The log-softmax of the source's logits at the observed tokens: float64 (K, t)."""
    members, positions, _ = source.shape
    observed = torch.empty(members, positions, dtype=torch.float64)
    for part, block in source.blocks(torch.arange(positions)):
        logits = chosen(block, targets[part])
        observed[:, part] = (logits - normalisers(block)).double().cpu()
    return observed


def chosen(block: Tensor, targets: Tensor) -> Tensor:
    """The logits (K, b) of the targets (b,), from logits (K, b, V)."""
    return block.gather(-1, targets.to(block.device).expand(len(block), -1)[..., None])[..., 0]


def normalisers(block: Tensor) -> Tensor:
    """log Σ_v exp s_k(v) of logits (K, b, V): float32 (K, b), NaN where it is not finite."""
    peak = block.amax(-1, keepdim=True)
    scratch = torch.empty_like(block[0])  # logsumexp allocates its own and takes twice as long
    sums = [torch.sub(logits, top, out=scratch).exp_().sum(-1) for logits, top in zip(block, peak, strict=True)]
    log_sums = torch.stack(sums).log_() + peak[..., 0]
    return log_sums.masked_fill_(~log_sums.isfinite(), torch.nan)
