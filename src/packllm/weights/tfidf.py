"""tf-idf of a prompt, over a fitted vocabulary, for `cbtm` and `router`.

The numbers equal those of scikit-learn's TfidfVectorizer with its defaults (lower case, words of at least two
characters, smoothed idf, rows of length 1). Fitting uses scikit-learn; the rest needs only numpy.
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
"""Terms that fitting keeps, at most; the most frequent ones."""

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
        """The tf-idf row of a text: float64 (F,), of length 1; all zeros if the text has none of the terms."""
        row = np.zeros(len(self.idf))
        for word, count in Counter(_WORD.findall(text.lower())).items():
            if word in self.index:
                row[self.index[word]] = count * self.idf[self.index[word]]
        return row / (np.linalg.norm(row) or 1.0)


def fit(texts: Sequence[str], what: str) -> tuple[Features, Any]:
    """Fit the features to texts; return them and the texts' rows as scikit-learn's sparse matrix.

    Raises:
        ExtraError: scikit-learn is not installed.
        DataError: no text contains a word.
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
    """A fitted strategy: its name, the members it knows, its features and its arrays."""

    strategy: str
    names: tuple[str, ...]
    features: Features
    arrays: dict[str, np.ndarray]

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file of plain arrays; loading it cannot run code."""
        terms = sorted(self.features.index, key=self.features.index.__getitem__)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            arrays = {"strategy": np.array(self.strategy), "names": np.array(self.names), "terms": np.array(terms)}
            np.savez_compressed(file, allow_pickle=False, idf=self.features.idf, **arrays, **self.arrays)


def load(path: str | None, strategy: str) -> Fitted:
    """Load the file of the option `fitted`.

    Raises:
        WeightsError: no file is given, or it is of another strategy.
    """
    if path is None:
        raise WeightsError(f"weighting={strategy!r} needs fitted=PATH, a file of packllm.weights.{strategy}.fit")
    try:
        fitted = _load(os.fspath(path), os.stat(path).st_mtime_ns)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"fitted={path!r} cannot be read: {error}") from None
    if fitted.strategy != strategy:
        raise WeightsError(f"fitted={path!r} was fitted for weighting={fitted.strategy!r}, not {strategy!r}")
    return fitted


@lru_cache(maxsize=8)
def _load(path: str, changed: int) -> Fitted:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    strategy, names = str(arrays.pop("strategy")), tuple(str(name) for name in arrays.pop("names"))
    index = {str(term): column for column, term in enumerate(arrays.pop("terms"))}
    return Fitted(strategy, names, Features(index, arrays.pop("idf")), arrays)


def known(fitted: Fitted, names: Sequence[str], text: str | None) -> str:
    """The prompt's text. Checks first that every member was fitted.

    Raises:
        WeightsError: a member was not fitted, or there are only logits and no text.
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
