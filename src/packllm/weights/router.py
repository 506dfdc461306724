"""router: a classifier over the prompt's words chooses one member, in the style of FoE (Wang et al. 2023,
arXiv 2310.01542). It must be trained on labelled prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from packllm.errors import DataError, ExtraError
from packllm.options import Options
from packllm.weights import tfidf
from packllm.weights.problem import Problem, Solution


def fit(prompts: Sequence[str], labels: Sequence[str], path: str | os.PathLike, *, seed: int = 0) -> None:
    """Train a logistic regression on the tf-idf of labelled prompts, and write it to `path` for the option `fitted`.

    Args:
        prompts: texts.
        labels: for each prompt, the name of the member that answers it best.
        path: file to write.
        seed: random seed of the training.

    Raises:
        ExtraError: scikit-learn is not installed.
        DataError: not one label per prompt, or the same label for all.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ExtraError("training the router", "scikit-learn", "eval") from None
    if len(labels) != len(prompts):
        raise DataError(f"the router has {len(labels)} labels for {len(prompts)} prompts; give each its member's name")
    if len(set(labels)) < 2:
        raise DataError("the router needs prompts labelled with at least two members' names")
    features, rows = tfidf.fit(prompts, "the router")
    model = LogisticRegression(C=10.0, max_iter=1000, random_state=seed).fit(rows, labels)
    weights, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn gives only the row of the second class
        weights, bias = np.concatenate((-weights, weights)) / 2, np.concatenate((-bias, bias)) / 2
    arrays = {"weights": weights.astype(np.float32), "bias": bias}
    tfidf.Fitted("router", tuple(map(str, model.classes_)), features, arrays).save(path)


def solve(problem: Problem, options: Options) -> Solution:
    """All weight on the member whose class scores highest; members without labelled prompts get none."""
    fitted = tfidf.load(options.fitted, "router")
    candidates = [name for name in problem.names if name in fitted.names]
    row = fitted.features.of(tfidf.known(fitted, candidates or problem.names, problem.text))
    scores = dict(zip(fitted.names, fitted.arrays["weights"] @ row + fitted.arrays["bias"], strict=True))
    best = max(candidates, key=scores.__getitem__)
    return Solution(tuple(float(name == best) for name in problem.names))
