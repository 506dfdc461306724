"""cbtm: weights by the distance of the prompt to each expert's corpus (Gururangan et al. 2023, arXiv 2303.14177;
PackLLM arXiv 2404.11531, Eq. 8)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from packllm.errors import DataError, ExtraError
from packllm.options import Options
from packllm.weights import tfidf
from packllm.weights.problem import Problem, Solution


def fit(corpora: Mapping[str, Sequence[str]], path: str | os.PathLike, *, clusters: int = 1, seed: int = 0) -> None:
    """Compute the centroids of each expert's corpus, and write them to `path` for the option `fitted`.

    k-means clusters the tf-idf rows of each corpus. One cluster is the mean of the corpus; the paper has this case,
    because each of its experts was trained on one cluster.

    Args:
        corpora: documents by member name, at least two members.
        path: file to write.
        clusters: centroids per member.
        seed: random seed of k-means.

    Raises:
        ExtraError: scikit-learn is not installed.
        DataError: fewer than two corpora, or a cluster of a single document.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ExtraError("fitting cbtm", "scikit-learn", "eval") from None
    if len(corpora) < 2:
        raise DataError(f"cbtm got corpora of {len(corpora)} member(s); give those of at least two members")
    for name, texts in corpora.items():
        if len(texts) < 2 * clusters:
            raise DataError(
                f"the corpus of {name!r} has {len(texts)} document{'s' * (len(texts) != 1)} for {clusters} "
                f"cluster{'s' * (clusters != 1)}: a cluster of one document is that document; give more documents"
            )
    features, rows = tfidf.fit([text for texts in corpora.values() for text in texts], "cbtm")
    centroids, begin = [], 0
    for name, texts in corpora.items():
        part = rows[begin : begin + len(texts)]
        kmeans = KMeans(clusters, n_init=3, random_state=seed).fit(part)
        if min(sizes := np.bincount(kmeans.labels_, minlength=clusters)) < 2:
            raise DataError(
                f"clusters={clusters}: one of {name!r} holds {min(sizes)} document(s), and would "
                f"be that document; ask for fewer clusters or give more documents"
            )
        centroids.append(kmeans.cluster_centers_)
        begin += len(texts)
    arrays = {"centroids": np.stack(centroids).astype(np.float32)}
    tfidf.Fitted("cbtm", tuple(corpora), features, arrays).save(path)


def solve(problem: Problem, options: Options) -> Solution:
    """λ = softmax(−d²/τ), where d is the distance in tf-idf space from the prompt to the member's nearest centroid."""
    fitted = tfidf.load(options.fitted, "cbtm")
    row = fitted.features.of(tfidf.known(fitted, problem.names, problem.text))
    centroids = fitted.arrays["centroids"][[fitted.names.index(name) for name in problem.names]]
    distances = ((centroids - row) ** 2).sum(-1).min(-1)
    exponentials = np.exp((distances.min() - distances) / options.tau)
    return Solution(tuple((exponentials / exponentials.sum()).tolist()))
