"""Prompts read by all members, and greedy answers from several of them together: a mixture, or a contrast."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from packllm.chat.prompt import Encoded
from packllm.weights.adaptive import Adaptive
from packllm_eval.evidence.methods import dropped, em
from packllm_eval.evidence.reading import Alone

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values (1, heads, tokens, size) of each layer."""


@dataclass(frozen=True)
class Read:
    """A prompt as all members read it.

    Attributes:
        scored: (K, t), log-probabilities of the prompt's scored tokens.
        gold: (K, n), those of the gold answer's tokens.
        first: (K, V), those of every first token of an answer.
        caches: of the prompt's tokens, by member.
        seconds: of reading the prompt, without the answer; on a CPU its own time, whatever else runs.
    """

    encoded: Encoded
    scored: np.ndarray
    gold: np.ndarray
    first: Tensor
    caches: list[Layers]
    seconds: float

    @property
    def weights(self) -> np.ndarray:
        """(K,): the weights of `em`."""
        return dropped(em(self.scored))


def clock(device: str) -> float:
    return time.process_time() if device == "cpu" else time.perf_counter()


def read(models: Sequence[Alone], encoded: Encoded, answer: Sequence[int]) -> tuple[Read, Tensor]:
    """The prompt, and the log-probabilities (K, n, V) before each token of the gold answer."""
    ids, size = [*encoded.ids, *answer], len(encoded.ids)
    start = encoded.positions[0]
    places = [place - start for place in encoded.positions]
    scored, every, caches, seconds = [], [], [], 0.0
    for model in models:
        started = clock(model.device)
        with torch.inference_mode():
            output = model.model(input_ids=torch.tensor([ids], device=model.device), use_cache=True)
            logprobs = model.real(output.logits[0, start - 1 : -1]).log_softmax(-1)
        scored.append(of(logprobs, ids[start:])[places])
        seconds += clock(model.device) - started
        every.append(logprobs[-len(answer) :].clone())
        caches.append([(one.keys[:, :, :size], one.values[:, :, :size]) for one in output.past_key_values.layers])
    whole = torch.stack(every)
    gold = np.stack([of(one, answer) for one in whole])
    return Read(encoded, np.stack(scored), gold, whole[:, 0].clone(), caches, seconds * size / len(ids)), whole


def of(logprobs: Tensor, ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities (n,) of these ids, from those of all (n, V)."""
    chosen = logprobs.gather(-1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0]
    return chosen.cpu().numpy().astype(np.float64)


def fused(logprobs: Tensor, weights: Tensor, contrast: float | None) -> Tensor:
    """(A, V), in the order of the fused probabilities, of A answers with P prompts each.

    Args:
        logprobs: the members' (K, A, P, V).
        weights: (A, P, K), or (A, 1, K), the same for all prompts.
        contrast: a in p ∝ p(first prompt)^(1 + a) / p(second prompt)^a; None: the mixture of the prompts.
    """
    p = (weights.permute(2, 0, 1)[..., None].to(logprobs) * logprobs.exp()).sum(0)
    if contrast is None:
        return p.sum(1)
    with_, without = p.clamp_min(1e-30).log().unbind(1)
    return (1 + contrast) * with_ - contrast * without


def greedy(
    models: Sequence[Alone],
    reads: Sequence[Sequence[Read]],
    weights: np.ndarray,
    limit: int,
    contrast: float | None = None,
) -> list[list[int]]:
    """The ids of A answers under weights that adapt, from P prompts each.

    Args:
        weights: (A, P, K), of the first token; with contrast (A, 1, K), learnt from the first prompt alone.
        limit: tokens of an answer, at most.
        contrast: as fused() takes it.
    """
    count, width = len(reads), len(reads[0])
    rows = [read for one in reads for read in one]
    batches = [_Batch(model, rows, k) for k, model in enumerate(models)]
    ends = torch.tensor(sorted(models[0].member.end_ids), device=models[0].device)
    logprobs = torch.stack([read.first for read in rows], 1).unflatten(1, (count, width))
    state, left = Adaptive(weights.reshape(count, -1)), np.arange(count)
    answers: list[list[int]] = [[] for _ in reads]
    for at in range(limit):
        current = state.weights().reshape(weights.shape)[left]
        tokens = fused(logprobs, torch.from_numpy(current).to(logprobs.device), contrast).argmax(-1)
        going = ~torch.isin(tokens, ends)
        for question, token, goes in zip(left, tokens.tolist(), going.tolist(), strict=True):
            if goes:
                answers[question].append(token)
        if not going.any() or at == limit - 1:
            break
        given = logprobs.gather(-1, tokens[None, :, None, None].expand(len(models), -1, width, 1))[..., 0]
        likelihoods = np.ones(weights.shape)
        likelihoods[left] = given.permute(1, 2, 0)[:, : weights.shape[1]].double().exp().cpu().numpy()
        state.observe(likelihoods.reshape(count, -1))
        if not going.all():
            for batch in batches:
                batch.keep(going.repeat_interleave(width))
            left, tokens = left[going.cpu().numpy()], tokens[going]
        steps = [batch.step(tokens.repeat_interleave(width)) for batch in batches]
        logprobs = torch.stack(steps).unflatten(1, (len(left), width))
    return answers


class _Batch:
    """One member after many prompts, padded on the left."""

    def __init__(self, model: Alone, reads: Sequence[Read], k: int) -> None:
        lengths = [len(read.encoded.ids) for read in reads]
        longest = max(lengths)
        self._model, self._cache = model, DynamicCache()
        self._places = torch.tensor(lengths, device=model.device)[:, None]
        self._mask = (torch.arange(longest, device=model.device) >= longest - self._places).long()
        for at, layers in enumerate(zip(*(read.caches[k] for read in reads), strict=True)):
            keys, values = (
                torch.cat([pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])
                for parts in zip(*layers, strict=True)
            )
            self._cache.update(keys, values, at)

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows.nonzero()[:, 0])
        self._mask, self._places = self._mask[rows], self._places[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (rows, V) after one more token of each row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], -1)
        with torch.inference_mode():
            output = self._model.model(
                input_ids=tokens[:, None],
                attention_mask=self._mask,
                position_ids=self._places,
                past_key_values=self._cache,
                use_cache=True,
            )
            self._places = self._places + 1
            return self._model.real(output.logits[:, -1]).log_softmax(-1)
