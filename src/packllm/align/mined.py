"""Minimum edit distance (MinED) mappings between vocabularies (PackLLM §3.4; Fu et al. 2023; Wan et al. 2024).

The distance is Levenshtein's over **bytes**: a token may hold part of a character only, so bytes are what
every token of every tokenizer has.
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
"""In place of a distance: a special token that the other vocabulary has under the same role."""

NONE = -2
"""In place of a distance: a special or unused id without a counterpart; its target id only keeps an input valid."""

_ROLES = {
    "end_of_turn": ("end_of_turn", "eos"),
    "eos": ("eos", "end_of_turn"),
    "bos": ("bos",),
    "pad": ("pad",),
    "unk": ("unk",),
}
"""Roles of reference tokens, the ones that matter most first, and the target's that correspond, likewise."""

_RULES = "1"  # to be changed with the rules: mappings that others made are then stale
_WORKSPACE = 2**26  # most bytes that one comparison holds, about
_UNSEEN = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Alignment:
    """How one vocabulary's tokens are put in another's.

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
    their spelling, and are no targets for text; one without a counterpart goes to the target's unk, pad or
    eos, where it has one. Vocabularies that are the same map by identity.

    The mapping is kept in cache_folder()/mined, by the content of both vocabularies: making it takes up to a
    minute, reading it a fraction of a second.

    Raises:
        VocabularyError: the target has no token of text.
    """
    if reference.same_as(target):
        return Alignment(torch.arange(len(reference)), torch.zeros(len(reference), dtype=torch.int32))
    key = _key(reference, target)
    path = cache_folder() / "mined" / f"{key[:32]}.safetensors"
    found = _read(path, key)
    if found is None:
        found = _compute(reference, target)
        _write(path, key, found)
    return found


def _compute(reference: Vocabulary, target: Vocabulary) -> Alignment:
    exact: dict[bytes, int] = {}
    for i in target.text:
        if i not in target.shadowed:
            exact.setdefault(target.tokens[i], i)  # of equal tokens the smaller id
    if not exact:
        raise VocabularyError("a vocabulary without a token of text cannot be mapped to; leave that member out")
    stand_in = next((target.special[role] for role in ("unk", "pad", "eos") if role in target.special), None)
    ids = torch.full((len(reference),), min(exact.values()) if stand_in is None else stand_in)
    distances = torch.full((len(reference),), NONE, dtype=torch.int32)
    _match_roles(reference, target, ids, distances)
    missing = list({reference.tokens[i] for i in reference.text} - exact.keys())
    near = dict(zip(missing, nearest(missing, list(exact), list(exact.values())), strict=True))
    for i in reference.text:
        token = reference.tokens[i]
        ids[i], distances[i] = (exact[token], 0) if token in exact else near[token]
    return Alignment(ids, distances)


def _match_roles(reference: Vocabulary, target: Vocabulary, ids: Tensor, distances: Tensor) -> None:
    """Fill in the special tokens that both have. Where several of the reference meet in one of the target's,
    the first role is its counterpart: were all of them, the end of an answer could be lost to a padding token."""
    matched: set[int] = set()
    taken: set[int] = set()
    for role, others in _ROLES.items():
        i = reference.special.get(role)
        j = next((target.special[other] for other in others if other in target.special), None)
        if i is None or j is None or i in matched:
            continue
        ids[i], distances[i] = j, NONE if j in taken else ROLE
        matched.add(i)
        taken.add(j)


@dataclass(frozen=True)
class _Pool:
    """Tokens of one length, with a number for each."""

    tokens: list[bytes]
    numbers: np.ndarray

    @cached_property
    def matrix(self) -> np.ndarray:
        """uint8 (n, length)."""
        return np.frombuffer(b"".join(self.tokens), np.uint8).reshape(len(self.tokens), -1)

    @classmethod
    def by_length(cls, tokens: Sequence[bytes], numbers: Sequence[int]) -> dict[int, _Pool]:
        """Non-empty tokens, by length."""
        groups: dict[int, tuple[list[bytes], list[int]]] = {}
        for token, number in zip(tokens, numbers, strict=True):
            group = groups.setdefault(len(token), ([], []))
            group[0].append(token)
            group[1].append(number)
        return {length: cls(group[0], np.array(group[1])) for length, group in sorted(groups.items())}


def nearest(queries: Sequence[bytes], targets: Sequence[bytes], ids: Sequence[int]) -> list[tuple[int, int]]:
    """For each query the id of the nearest target, by alignment()'s rules, and its distance.

    Exact: two tokens are at least as far apart as their lengths, so targets are compared by growing difference
    of length until that alone exceeds the smallest distance found. About 10^8 pairs a second on two cores;
    rapidfuzz's score_cutoff does not pay on tokens, which are short.

    Args:
        queries: tokens, none of them empty.
        targets: at least one token, none of them empty.
        ids: the targets' ids, in 0..2^32-1.
    """
    pools = _Pool.by_length(targets, ids)
    found: list[tuple[int, int]] = [(0, 0)] * len(queries)
    with tqdm(total=len(queries), desc="Aligning vocabularies (once)", unit="token", disable=None) as bar:
        for length, group in _Pool.by_length(queries, range(len(queries))).items():
            best = _Best(group)
            unsettled, gap = np.arange(len(group.tokens)), 0
            while len(unsettled):
                for near in {length - gap, length + gap} & pools.keys():
                    best.improve(unsettled, pools[near])
                gap += 1
                settled = best.distances[unsettled] < gap
                bar.update(int(settled.sum()))
                unsettled = unsettled[~settled]
            for number, pair in zip(group.numbers, zip(best.ids, best.distances, strict=True), strict=True):
                found[number] = int(pair[0]), int(pair[1])
    return found


class _Best:
    """The nearest targets that queries of one length have met so far."""

    def __init__(self, queries: _Pool) -> None:
        self._queries = queries
        self.distances = np.full(len(queries.tokens), _UNSEEN)
        self._ranks = np.full(len(queries.tokens), -1)  # of equally near targets the highest rank wins

    @property
    def ids(self) -> np.ndarray:
        return 2**32 - 1 - (self._ranks & (2**32 - 1))

    def improve(self, which: np.ndarray, targets: _Pool) -> None:
        """Compare the given queries with targets of one length."""
        common = min(self._queries.matrix.shape[1], targets.matrix.shape[1])
        longest = max(self._queries.matrix.shape[1], targets.matrix.shape[1])
        rows = max(1, _WORKSPACE // (len(targets.tokens) * (2 * common + 32)))
        for at in range(0, len(which), rows):
            part = which[at : at + rows]
            tokens = [self._queries.tokens[i] for i in part]
            dtype = np.uint8 if longest < 256 else np.int32
            distances = cdist(tokens, targets.tokens, scorer=Levenshtein.distance, dtype=dtype, workers=-1)
            lowest = distances.min(axis=1)
            least = np.minimum(lowest, self.distances[part]).astype(dtype)  # of one type they compare fast
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


def _checksum(key: str, found: Alignment) -> str:
    parts = (key.encode(), found.ids.numpy().tobytes(), found.distances.numpy().tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _read(path: Path, key: str) -> Alignment | None:
    """The mapping kept under this key; None where there is none, or not as it was written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = Alignment(file.get_tensor("ids"), file.get_tensor("distances"))
            stated = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError) as error:
        log.warning("the kept mapping %s cannot be read, making it again: %s", path, error)
        return None
    if stated != _checksum(key, found):
        log.warning("the kept mapping %s is not as it was written, making it again", path)
        return None
    return found


def _write(path: Path, key: str, found: Alignment) -> None:
    """Keep a mapping; where that is not possible, say so and go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=".draft-", dir=path.parent)
        os.close(handle)
        try:
            checksum = {"checksum": _checksum(key, found)}
            save_file({"ids": found.ids, "distances": found.distances}, draft, checksum)
            os.replace(draft, path)  # atomic: another process sees the whole file or none
        except BaseException:
            os.unlink(draft)
            raise
    except (OSError, SafetensorError) as error:
        log.warning("cannot keep a mapping of vocabularies in %s: %s", path.parent, error)
