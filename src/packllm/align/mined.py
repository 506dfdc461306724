"""Minimum edit distance (MinED) mappings between vocabularies (PackLLM §3.4; Fu et al. 2023; Wan et al. 2024).

The distance is Levenshtein's over **bytes**: a token may be only a part of a character, so bytes are the unit that
all tokenizers have in common.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from packllm.align.vocabulary import Vocabulary
from packllm.cache import cache_folder
from packllm.errors import VocabularyError

log = logging.getLogger("packllm")

ROLE = -1
"""Stands in for a distance: both vocabularies have a special token of this role."""

NONE = -2
"""Stands in for a distance: a special or unused id without a counterpart. Its target id only keeps the input valid."""

_ROLES = {
    "end_of_turn": ("end_of_turn", "eos"),
    "eos": ("eos", "end_of_turn"),
    "bos": ("bos",),
    "pad": ("pad",),
    "unk": ("unk",),
}
"""The roles of reference tokens, most important first; for each, the target's roles that correspond, best first."""

_RULES = "1"  # raise it when the rules change: cached mappings made by other rules then no longer match
_WORKSPACE = 2**26  # upper bound of the bytes that one comparison needs, roughly
_UNSEEN = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Alignment:
    """A mapping of one vocabulary's tokens to another's.

    Attributes:
        ids: int64 (V_reference,), the target id for every reference id.
        distances: int32 (V_reference,), bytes to insert, delete or replace between the two tokens; 0 is an
            exact match. ROLE or NONE for ids that are not text.
    """

    ids: Tensor
    distances: Tensor


def mined(reference: Vocabulary, target: Vocabulary) -> Tensor:
    """The target id nearest to every reference id: int64 (V_reference,). See alignment()."""
    return alignment(reference, target).ids


def alignment(reference: Vocabulary, target: Vocabulary) -> Alignment:
    """Map every reference token to the target token at the smallest edit distance over bytes.

    Ties go to the longer common prefix, then to the smaller id. Special tokens are matched by role, never by
    spelling, and never serve as targets for text. A special token without a counterpart goes to the target's unk,
    pad or eos token, if there is one. Equal vocabularies are mapped by identity.

    The mapping is cached in cache_folder()/mined under a hash of both vocabularies: computing it takes up to a
    minute, loading it a fraction of a second.

    Raises:
        VocabularyError: the target has no text tokens.
    """
    if reference.same_as(target):
        return Alignment(torch.arange(len(reference)), torch.zeros(len(reference), dtype=torch.int32))
    key = _key(reference, target)
    path = cache_folder() / "mined" / f"{key[:32]}.safetensors"
    mapping = _read(path, key)
    if mapping is None:
        mapping = _compute(reference, target)
        _write(path, key, mapping)
    return mapping


def _compute(reference: Vocabulary, target: Vocabulary) -> Alignment:
    exact: dict[bytes, int] = {}
    for i in target.text:
        if i not in target.shadowed:
            exact.setdefault(target.tokens[i], i)  # equal tokens: the smaller id
    if not exact:
        raise VocabularyError("a vocabulary without text tokens cannot be a mapping's target; leave that member out")
    stand_in = next((target.special[role] for role in ("unk", "pad", "eos") if role in target.special), None)
    ids = torch.full((len(reference),), min(exact.values()) if stand_in is None else stand_in)
    distances = torch.full((len(reference),), NONE, dtype=torch.int32)
    _match_roles(reference, target, ids, distances)
    missing = list({reference.tokens[i] for i in reference.text} - exact.keys())
    nearest_targets = dict(zip(missing, nearest(missing, list(exact), list(exact.values())), strict=True))
    for i in reference.text:
        token = reference.tokens[i]
        ids[i], distances[i] = (exact[token], 0) if token in exact else nearest_targets[token]
    return Alignment(ids, distances)


def _match_roles(reference: Vocabulary, target: Vocabulary, ids: Tensor, distances: Tensor) -> None:
    """Fill in the special tokens that both vocabularies have. Several reference tokens may have the same target: only
    the first role counts as its counterpart. Otherwise a padding token could take over the end of an answer."""
    mapped: set[int] = set()
    targets: set[int] = set()
    for role, target_roles in _ROLES.items():
        i = reference.special.get(role)
        j = next((target.special[target_role] for target_role in target_roles if target_role in target.special), None)
        if i is None or j is None or i in mapped:
            continue
        ids[i], distances[i] = j, NONE if j in targets else ROLE
        mapped.add(i)
        targets.add(j)


@dataclass(frozen=True)
class _Pool:
    """Tokens of one length, each with its number."""

    tokens: list[bytes]
    numbers: np.ndarray

    @cached_property
    def matrix(self) -> np.ndarray:
        """uint8 (n, length)."""
        return np.frombuffer(b"".join(self.tokens), np.uint8).reshape(len(self.tokens), -1)

    @classmethod
    def by_length(cls, tokens: Sequence[bytes], numbers: Sequence[int]) -> dict[int, _Pool]:
        """Group non-empty tokens by length."""
        groups: dict[int, tuple[list[bytes], list[int]]] = {}
        for token, number in zip(tokens, numbers, strict=True):
            group = groups.setdefault(len(token), ([], []))
            group[0].append(token)
            group[1].append(number)
        return {length: cls(group[0], np.array(group[1])) for length, group in sorted(groups.items())}


def nearest(queries: Sequence[bytes], targets: Sequence[bytes], ids: Sequence[int]) -> list[tuple[int, int]]:
    """The nearest target of each query, by alignment()'s rules: (id, distance in bytes).

    The search is exact. The difference of two tokens' lengths is a lower bound of their distance, so targets are
    compared by increasing difference of length until that bound exceeds the smallest distance. About 10^8 pairs a
    second on two cores; rapidfuzz's score_cutoff does not speed up tokens, which are short.

    Args:
        queries: tokens, none of them empty.
        targets: at least one token, none of them empty.
        ids: the targets' ids, in 0..2^32-1.
    """
    pools = _Pool.by_length(targets, ids)
    results: list[tuple[int, int]] = [(0, 0)] * len(queries)
    with tqdm(total=len(queries), desc="Aligning vocabularies (once)", unit="token", disable=None) as bar:
        for length, group in _Pool.by_length(queries, range(len(queries))).items():
            best = _Best(group)
            pending, gap = np.arange(len(group.tokens)), 0
            while len(pending):
                for target_length in {length - gap, length + gap} & pools.keys():
                    best.improve(pending, pools[target_length])
                gap += 1
                final = best.distances[pending] < gap
                bar.update(int(final.sum()))
                pending = pending[~final]
            for number, pair in zip(group.numbers, zip(best.ids, best.distances, strict=True), strict=True):
                results[number] = int(pair[0]), int(pair[1])
    return results


class _Best:
    """The nearest target of each query of one length, among the targets compared so far."""

    def __init__(self, queries: _Pool) -> None:
        self._queries = queries
        self.distances = np.full(len(queries.tokens), _UNSEEN)
        self._ranks = np.full(len(queries.tokens), -1)  # the highest rank wins among equally near targets

    @property
    def ids(self) -> np.ndarray:
        return 2**32 - 1 - (self._ranks & (2**32 - 1))

    def improve(self, which: np.ndarray, targets: _Pool) -> None:
        """Compare the queries at the indices `which` with targets of one length."""
        common = min(self._queries.matrix.shape[1], targets.matrix.shape[1])
        longest = max(self._queries.matrix.shape[1], targets.matrix.shape[1])
        rows = max(1, _WORKSPACE // (len(targets.tokens) * (2 * common + 32)))
        for at in range(0, len(which), rows):
            part = which[at : at + rows]
            tokens = [self._queries.tokens[i] for i in part]
            dtype = np.uint8 if longest < 256 else np.int32
            distances = cdist(tokens, targets.tokens, scorer=Levenshtein.distance, dtype=dtype, workers=-1)
            lowest = distances.min(axis=1)
            least = np.minimum(lowest, self.distances[part]).astype(dtype)  # equal types compare faster
            row, column = np.divmod(np.flatnonzero(distances == least[:, None]), len(targets.tokens))
            if len(row):
                same = self._queries.matrix[part[row], :common] == targets.matrix[column, :common]
                prefix = np.where(same.all(axis=1), common, same.argmin(axis=1))
                ranks = prefix << 32 | (2**32 - 1 - targets.numbers[column])
                starts = np.flatnonzero(np.diff(row, prepend=-1))
                self._keep(part[row[starts]], least[row[starts]], np.maximum.reduceat(ranks, starts))

    def _keep(self, which: np.ndarray, distances: np.ndarray, ranks: np.ndarray) -> None:
        better = (distances < self.distances[which]) | (ranks > self._ranks[which])
        self.distances[which[better]] = distances[better]
        self._ranks[which[better]] = ranks[better]


def _key(reference: Vocabulary, target: Vocabulary) -> str:
    digest = hashlib.sha256(_RULES.encode())
    for vocabulary in (reference, target):
        ids = [sorted(part) for part in (vocabulary.control, vocabulary.unused, vocabulary.shadowed)]
        digest.update(f"{vocabulary.fingerprint} {sorted(vocabulary.special.items())} {ids}".encode())
    return digest.hexdigest()


def _checksum(key: str, mapping: Alignment) -> str:
    parts = (key.encode(), mapping.ids.numpy().tobytes(), mapping.distances.numpy().tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _read(path: Path, key: str) -> Alignment | None:
    """The mapping cached under this key; None if there is none or the file was changed."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            mapping = Alignment(file.get_tensor("ids"), file.get_tensor("distances"))
            checksum = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError) as error:
        log.warning("cannot read the cached mapping %s, computing it again: %s", path, error)
        return None
    if checksum != _checksum(key, mapping):
        log.warning("the cached mapping %s was changed since it was written, computing it again", path)
        return None
    return mapping


def _write(path: Path, key: str, mapping: Alignment) -> None:
    """Cache a mapping; log a warning if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
        os.close(handle)
        try:
            checksum = {"checksum": _checksum(key, mapping)}
            save_file({"ids": mapping.ids, "distances": mapping.distances}, draft, checksum)
            os.replace(draft, path)  # atomic: another process sees the whole file or none
        except BaseException:
            os.unlink(draft)
            raise
    except (OSError, SafetensorError) as error:
        log.warning("cannot cache a mapping of vocabularies in %s: %s", path.parent, error)
