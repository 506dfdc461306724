"""What a weighting gets to see: how well each member predicted one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from packllm.errors import WeightsError
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
        called again; each call computes anew. A block may be overwritten by the next one."""
        ...


@dataclass(frozen=True)
class Problem:
    """One prompt as the members scored it.

    Attributes:
        names: the members' names.
        logprobs: float64 (K, t), log p_k of each observed token (or word).
        nll: float64 (K,), each member's mean NLL in the unit that members are compared by (METHODS §2).
        source: the logits behind `logprobs`, for the log-pool optimisers; None where the members share no
            tokens to fuse on.
        targets: int64 (t,), the observed tokens; None with `source`.
    """

    names: tuple[str, ...]
    logprobs: Tensor
    nll: Tensor
    source: LogitSource | None = None
    targets: Tensor | None = None

    def logits(self, strategy: str) -> tuple[LogitSource, Tensor]:
        """`source` and `targets`, for a weighting that cannot do without them."""
        if self.source is None or self.targets is None:
            raise WeightsError(
                f"weighting={strategy!r} needs members that split the scored text into the same tokens of one "
                f"vocabulary; use weighting='em', 'sim' or 'top1' for this pack"
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
    """One strategy: the pool it is meant for, what it computes, and whether it reads logits (which makes
    the prefill keep what it needs to produce them again)."""

    pool: Pool
    solve: Callable[[Problem, Options], Solution]
    needs_logits: bool = False


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
    for part, logits in source.blocks(torch.arange(positions)):
        chosen = logits.gather(-1, targets[part].expand(members, -1)[..., None].to(logits.device))[..., 0]
        observed[:, part] = (chosen - logits.logsumexp(-1)).double().cpu()
    return observed
