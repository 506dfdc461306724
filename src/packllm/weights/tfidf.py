"""tf-idf of a prompt, from a fitted vocabulary alone: what `cbtm` and `router` look at.

The same numbers as scikit-learn's TfidfVectorizer with its defaults (lower case, words of two characters or
more, smoothed idf, rows of length 1), which does the fitting; reading needs numpy only.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from packllm.errors import DataError, ExtraError, WeightsError

TERMS = 8192
"""Most terms that fitting keeps: the commonest ones."""

_WORD = re.compile(r"(?u)\b\w\w+\b")


@dataclass(frozen=True)
class Features:
    """Terms and their idf.

    Attributes:
        index: column of each term.
        idf: float64 (F,).
    """

    index: dict[str, int]
    idf: np.ndarray

    def of(self, text: str) -> np.ndarray:
        """float64 (F,), of length 1; zeros where the text has none of the terms."""
        row = np.zeros(len(self.idf))
        for word, count in Counter(_WORD.findall(text.lower())).items():
            if word in self.index:
                row[self.index[word]] = count * self.idf[self.index[word]]
        return row / (np.linalg.norm(row) or 1.0)


def fit(texts: Sequence[str], what: str) -> tuple[Features, Any]:
    """Features of these texts, and their rows as scikit-learn's sparse matrix.

    Raises:
        ExtraError: scikit-learn is absent.
        DataError: no text holds a word.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ExtraError(f"fitting {what}", "scikit-learn", "eval") from None
    vectoriser = TfidfVectorizer(max_features=TERMS)
    try:
        rows = vectoriser.fit_transform(texts)
    except ValueError as error:
        raise DataError(f"cannot fit {what}: {error}") from None
    index = {term: int(column) for term, column in vectoriser.vocabulary_.items()}
    return Features(index, np.asarray(vectoriser.idf_)), rows


@dataclass(frozen=True)
class Fitted:
    """What a strategy learnt: its name, the members it knows, its features and its arrays."""

    strategy: str
    names: tuple[str, ...]
    features: Features
    arrays: dict[str, np.ndarray]

    def save(self, path: str | os.PathLike) -> None:
        """An .npz file of plain arrays: reading it cannot run code."""
        terms = sorted(self.features.index, key=self.features.index.__getitem__)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            arrays = {"strategy": np.array(self.strategy), "names": np.array(self.names), "terms": np.array(terms)}
            np.savez_compressed(file, allow_pickle=False, idf=self.features.idf, **arrays, **self.arrays)


def load(path: str | None, strategy: str) -> Fitted:
    """The fitted file that the option `fitted` names.

    Raises:
        WeightsError: no file named, or not one of that strategy.
    """
    if path is None:
        raise WeightsError(f"weighting={strategy!r} needs fitted=PATH, a file of packllm.weights.{strategy}.fit")
    try:
        found = _load(os.fspath(path), os.stat(path).st_mtime_ns)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"fitted={path!r} cannot be read: {error}") from None
    if found.strategy != strategy:
        raise WeightsError(f"fitted={path!r} was fitted for weighting={found.strategy!r}, not {strategy!r}")
    return found


@lru_cache(maxsize=8)
def _load(path: str, changed: int) -> Fitted:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    strategy, names = str(arrays.pop("strategy")), tuple(str(name) for name in arrays.pop("names"))
    index = {str(term): column for column, term in enumerate(arrays.pop("terms"))}
    return Fitted(strategy, names, Features(index, arrays.pop("idf")), arrays)


def known(fitted: Fitted, names: Sequence[str], text: str | None) -> str:
    """The prompt's text, once it is sure that every member is known.

    Raises:
        WeightsError: a member that was not fitted, or logits without text.
    """
    missing = [name for name in names if name not in fitted.names]
    if missing:
        raise WeightsError(
            f"weighting={fitted.strategy!r} knows {', '.join(fitted.names)}, not member {missing[0]!r}; "
            f"fit it with that member's texts, or leave the member out"
        )
    if text is None:
        raise WeightsError(f"weighting={fitted.strategy!r} reads the prompt's text; use it through a pack")
    return text
