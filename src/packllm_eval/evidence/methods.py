"""The compared methods, on arrays: weights from a prompt, and the likelihood of the text that follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from packllm.align.words import Scored, common_words
from packllm.weights.adaptive import Adaptive
from packllm.weights.em import maximise
from packllm_eval.evidence.reading import POOLED, Row, Scores

LEAST = 0.01
"""Members below this weight are dropped, as with the option min_weight."""

CALIBRATED = 30
"""Number of rows to fit a prior on: of one domain, or of all domains together ("pooled")."""


@dataclass(frozen=True)
class Method:
    """A row of the table of answers.

    Attributes:
        weighting: a member's name, top1, uniform, sim, opt, em.
        prior: the prior of `em`: none, or one from 30 rows of all domains, or of the row's own domain.
        adapt: whether the weights are updated during the answer.
        pool: how the members are fused.
    """

    label: str
    weighting: str
    prior: Literal["", "pooled", "own"] = ""
    adapt: bool = False
    pool: Literal["linear", "log"] = "linear"


def methods(names: Sequence[str]) -> list[Method]:
    """All methods, the most important first."""
    return [
        Method("em", "em"),
        Method("em + prior (pooled)", "em", "pooled"),
        Method("em + prior (own)", "em", "own"),
        Method("em + adapt", "em", "", True),
        Method("em + prior (own) + adapt", "em", "own", True),
        *(Method(f"member {name}", name) for name in names),
        Method("top1", "top1"),
        *(Method(name, name, pool="log") for name in POOLED),
        Method("em + prior (pooled) + adapt", "em", "pooled", True),
        Method("uniform, linear", "uniform"),
    ]


def priors(rows: Sequence[tuple[Row, np.ndarray]], alpha: float = 1.0) -> dict[str, np.ndarray]:
    """Priors {corpus or "pooled": π}, from rows with the (K, n) log-probabilities of their gold answers."""
    by_corpus: dict[str, list[np.ndarray]] = {}
    for row, answer in rows:
        by_corpus.setdefault(row.corpus, []).append(answer)
    share = CALIBRATED // max(1, len(by_corpus))
    chosen = {corpus: answers[:CALIBRATED] for corpus, answers in by_corpus.items()}
    chosen["pooled"] = [answer for answers in by_corpus.values() for answer in answers[:share]]
    return {name: em(np.concatenate(answers, axis=1), alpha) for name, answers in chosen.items()}


def em(logprobs: np.ndarray, strength: float | Literal["prompt"] = 1.0, prior: np.ndarray | None = None) -> np.ndarray:
    """The weights of em, without dropping small ones."""
    uniform = np.full(len(logprobs), 1.0 / len(logprobs))
    return np.array(maximise(logprobs, uniform if prior is None else prior, strength)[0])


def dropped(weights: np.ndarray, least: float = LEAST) -> np.ndarray:
    """The weights with those below `least` set to 0 and renormalized; the largest is never dropped."""
    remaining = np.where(weights >= min(least, weights.max()), weights, 0.0)
    return remaining / remaining.sum()


def weights_of(
    method: Method, names: Sequence[str], row: Row, prompt: np.ndarray, known: dict[str, np.ndarray], pooled: Any = None
) -> np.ndarray:
    """Weights (K,) from a prompt's log-probabilities (K, t).

    Args:
        known: priors by corpus and "pooled".
        pooled: {weighting: (weights, ...)} of this row, used for the log pool.
    """
    if method.weighting in names:
        return np.eye(len(names))[list(names).index(method.weighting)]
    if method.weighting == "top1":
        return np.eye(len(names))[int(prompt.sum(1).argmax())]
    if method.pool == "log":
        return dropped(np.asarray(pooled[method.weighting][0]))
    if method.weighting == "uniform":
        return np.full(len(names), 1.0 / len(names))
    prior = known.get(row.corpus if method.prior == "own" else "pooled") if method.prior else None
    return dropped(em(prompt, "prompt" if method.prior else 1.0, prior))


def likelihood(weights: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities (n,) of the mixture, from the members' (K, n)."""
    return np.log(weights @ np.exp(logprobs))


def adapting(
    weights: np.ndarray, logprobs: Sequence[np.ndarray], least: float = 0.0, block: int = 1
) -> tuple[np.ndarray, float]:
    """NLL in nats of each text under weights that are updated at each token, and the mean number of members per token.

    Args:
        weights: (rows, K), the initial weights of each text.
        logprobs: (K, n) for each row.
        least: members below this weight at a block's start are idle during the block, and read it at its end.
        block: tokens of a block.
    """
    length = max(logprob.shape[1] for logprob in logprobs)
    p = np.ones((len(logprobs), weights.shape[1], length))
    known = np.zeros((len(logprobs), length), bool)
    for row, logprob in enumerate(logprobs):
        p[row, :, : logprob.shape[1]] = np.exp(logprob)
        known[row, : logprob.shape[1]] = True
    state, within, awake = Adaptive(weights), Adaptive(weights), weights >= 0
    nats, run = np.zeros(len(logprobs)), 0
    for at in range(length):
        if at % block == 0:
            now, within = state.weights(), state.fork()
            awake = now >= np.minimum(least, now.max(-1, keepdims=True))
        logprob, now = p[..., at], np.where(awake, within.weights(), 0.0)
        mixture = (now * logprob).sum(-1) / now.sum(-1)
        nats -= np.log(mixture) * known[:, at]
        run += int((awake * (weights > 0) * known[:, at, None]).sum())
        state.observe(logprob)
        # Idle members have not read the token yet, so it changes only the ratios of the others.
        within.observe(np.where(awake, logprob, mixture[:, None]))
    return nats, run / known.sum()


def nll(weights: np.ndarray, texts: Sequence[np.ndarray], adapt: bool = False) -> np.ndarray:
    """Nats of each text (K, n), under weights (rows, K)."""
    if adapt:
        return adapting(weights, texts)[0]
    return np.array([-likelihood(w, text).sum() for w, text in zip(weights, texts, strict=True)])


def together(row: Row, scores: Sequence[Scores], families: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (K, n) of a prompt's units under all members, and the units' spans (n, 2). The units are tokens
    if the members share a vocabulary, and words otherwise."""
    least = min(len(one.prompt) for one in scores)
    if len({*families}) == 1 and all((s.spans[-least:] == scores[0].spans[-least:]).all() for s in scores):
        return np.stack([one.prompt[-least:] for one in scores]), scores[0].spans[-least:]
    text = row.prompt if isinstance(row.prompt, str) else "".join(str(m["content"]) for m in row.prompt)
    return _words(text, [(one.prompt, one.spans) for one in scores])


def answers_together(row: Row, scores: Sequence[Scores], families: Sequence[str]) -> list[np.ndarray]:
    """Log-probabilities (K, n) of each text that may follow the prompt."""
    if len({*families}) == 1:
        return [np.stack([one.texts[at] for one in scores]) for at in range(len(row.texts))]
    return [
        _words(text, [(one.texts[at], one.text_spans[at]) for one in scores])[0] for at, text in enumerate(row.texts)
    ]


def _words(text: str, scored: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    parts = [
        Scored(list(range(len(p))), spans[:, 0].tolist(), spans[:, 1].tolist(), [], torch.from_numpy(p))
        for p, spans in scored
    ]
    matrix, spans = common_words(text, parts)
    return matrix.numpy(), np.array(spans).reshape(-1, 2)
