"""Fusion rules: they combine several members' next-token distributions into one (METHODS §1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packllm.weights.result import Pool


def fuse(logprobs: Tensor, weights: Sequence[float], pool: Pool) -> Tensor:
    """The fused distribution, as normalised log-probabilities.

    linear: p = Σ λ_k p_k (Eq. 8). log: p = softmax(Σ λ_k log p_k) (Eq. 1; the members' normalisers are
    constant over the vocabulary and cancel, so logits give the same).

    Args:
        logprobs: float32 (K, ..., V), each member's log-probabilities.
        weights: K weights other than 0; negative ones only in the log pool.
        pool: "linear" or "log".

    Returns:
        float32 (..., V).
    """
    if len(weights) == 1:  # a single member: already normalised
        return logprobs[0]
    scale = torch.tensor(weights, dtype=logprobs.dtype, device=logprobs.device)
    if pool == "linear":
        # logsumexp over the members; torch's own is three times slower on this stride.
        peak = logprobs.amax(0).clamp_min(-1e30)  # if all members have −inf, −inf − peak is still defined
        return torch.tensordot(scale, (logprobs - peak).exp(), 1).log() + peak
    fused = torch.tensordot(scale, logprobs.clamp_min(-1e30), 1)
    if min(weights) < 0:  # −inf − (−inf) is undefined: a token with probability 0 for any member is excluded
        fused = fused.masked_fill(logprobs.isneginf().any(0), -torch.inf)
    return fused.log_softmax(-1)
