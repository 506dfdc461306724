"""What a weighting gets to see: how well each member predicted one prompt."""

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
    """Next-token logits of K members on the t scored positions of one prompt, never all at once."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, t, V)."""
        ...

    def blocks(self, positions: Tensor, members: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """For the given positions (int64, ascending, of 0..t-1): pairs of a part of them, shape (b,), and
        float32 logits on those, shape (K, b, V), or of the given members only, in their order. May be
        called again; each call computes anew. A block may be overwritten by the next one, and by the caller."""
        ...


@runtime_checkable
class SharedHeadSource(LogitSource, Protocol):
    """A LogitSource whose members' logits are one matrix times hidden states: s_k = W h_k. Then Σ_k λ_k s_k =
    W Σ_k λ_k h_k and E_p s_k = h_k · Wᵀp, so that two products give what otherwise takes K."""

    def losses(
        self, weights: np.ndarray, positions: Tensor, targets: Tensor, members: Sequence[int]
    ) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        """Pool of `members` under `weights` on the given positions (any order), part by part: float32 (b,), its
        loss −log p(x), and what gives for rows (m,) of them float32 (len(members), m), the loss's gradient
        E_p s_k − s_k(x), until the next part is asked for."""
        ...


class Problem:
    """One prompt as the members scored it.

    Args:
        names: the members' names.
        logprobs: float64 (K, t), log p_k of each observed token (or word); without it they are read from the
            source when first asked for, unless a weighting that reads the logits anyway has told them by then.
        nll: float64 (K,), each member's mean NLL in the unit that members are compared by (METHODS §2); without
            it the sum of -logprobs over `units`.
        source: the logits behind `logprobs`, for the log-pool optimisers; None where the members share no
            tokens to fuse on.
        targets: int64 (t,), the observed tokens; None with `source`.
        text: the scored text, for weightings that read it; None where there are only logits.
        units: how many units the observed tokens are; as many as tokens if None.
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
            self.told(observed_logprobs(source, targets))
        assert self._logprobs is not None
        return self._logprobs

    @property
    def nll(self) -> Tensor:
        """float64 (K,), each member's mean NLL per unit."""
        if self._nll is not None:
            return self._nll
        return -self.logprobs.sum(1) / max(self._units or self.scored, 1)

    def told(self, logprobs: Tensor) -> None:
        """Take `logprobs` from who has read all logits, where they are not known yet."""
        self.check(logprobs)
        if self._logprobs is None:
            self._logprobs = logprobs

    def check(self, logprobs: Tensor) -> None:
        """MemberError naming the member with a NaN in `logprobs` (K, ...), which stands for logits that are none."""
        for name, faulty in zip(self.names, logprobs.isnan().flatten(1).any(1).tolist(), strict=True):
            if faulty:
                raise MemberError(name, "its logits are not finite (NaN or infinity)")

    def logits(self, strategy: str) -> tuple[LogitSource, Tensor]:
        """`source` and `targets`, for a weighting that cannot do without them."""
        if self.source is None or self.targets is None:
            raise WeightsError(
                f"weighting={strategy!r} needs members that split the scored text into the same tokens of one "
                f"vocabulary; use weighting='em', 'sim' or 'top1' for this pack, or decoding='mined', which maps "
                f"different vocabularies"
            )
        return self.source, self.targets


@dataclass(frozen=True)
class Solution:
    """Weights in member order, and what the weighting knows about them (see Weights)."""

    values: tuple[float, ...]
    fused_nll: float | None = None
    gap: float | None = None


@dataclass(frozen=True)
class Weighting:
    """One strategy.

    Attributes:
        pool: what it is meant for.
        solve: what it computes.
        needs_logits: whether it reads logits, which makes the prefill keep what it needs to produce them again.
        takes: names of the options that it reads; it ignores the others, which belong to other strategies.
    """

    pool: Pool
    solve: Callable[[Problem, Options], Solution]
    needs_logits: bool = False
    takes: tuple[str, ...] = ()


class TensorSource:
    """A LogitSource over a (K, t, V) tensor that the caller already holds.

    Args:
        logits: (K, t, V), any float type.
        block: positions a block.
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
    """float64 (K, t): log-softmax of the source's logits at the observed tokens."""
    members, positions, _ = source.shape
    observed = torch.empty(members, positions, dtype=torch.float64)
    for part, block in source.blocks(torch.arange(positions)):
        logits = chosen(block, targets[part])
        observed[:, part] = (logits - normalisers(block)).double().cpu()
    return observed


def chosen(block: Tensor, targets: Tensor) -> Tensor:
    """Logits (K, b) of the targets (b,) among logits (K, b, V)."""
    return block.gather(-1, targets.to(block.device).expand(len(block), -1)[..., None])[..., 0]


def normalisers(block: Tensor) -> Tensor:
    """log Σ_v exp s_k(v) of logits (K, b, V): float32 (K, b), NaN where that is not finite."""
    peak = block.amax(-1, keepdim=True)
    scratch = torch.empty_like(block[0])  # logsumexp takes a fresh one each time, and twice as long
    sums = [torch.sub(logits, top, out=scratch).exp_().sum(-1) for logits, top in zip(block, peak, strict=True)]
    found = torch.stack(sums).log_() + peak[..., 0]
    return found.masked_fill_(~found.isfinite(), torch.nan)
