"""Teacher-forced log-probabilities of all texts under every member, as arrays."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packllm.align.words import offsets
from packllm.chat.messages import check
from packllm.chat.prompt import Encoded
from packllm.engines.member import Member
from packllm.errors import DataError
from packllm.weights import blocks, solve
from packllm.weights.problem import TensorSource

CHUNK = 128
"""Rows per file of arrays."""

PIECE = 2**13
"""Tokens of a batch on an accelerator, at most; a sixteenth of it on a CPU."""

POOLED = ("uniform", "sim", "opt")
"""Weightings of the log pool. They need whole distributions, so they are computed only for questions with passages."""

ALONE = "Answer:"
"""Prompt of a choice for its likelihood without the question."""


@dataclass(frozen=True)
class Row:
    """A line of texts.jsonl.gz (see examples/evidence_texts.py)."""

    id: str
    set: str
    corpus: str
    use: str
    prompt: Any
    texts: list[str]
    answer: int = 0


@dataclass(frozen=True)
class Scores:
    """One member's log-probabilities of a row, float32 (n,), and character offsets of its tokens, for the prompt and
    each text; for multiple choice also those of the texts without the question."""

    prompt: np.ndarray
    spans: np.ndarray  # int (n, 2), of the prompt
    texts: list[np.ndarray]
    text_spans: list[np.ndarray]
    alone: list[np.ndarray]


def rows_of(data: Path, limit: int | None) -> list[Row]:
    """The texts; with `limit` only the first ones of each corpus and use."""
    with gzip.open(data / "texts.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [Row(**json.loads(line)) for line in file]
    counts: dict[tuple[str, str, str], int] = {}
    selected = []
    for row in rows:
        key = row.set, row.corpus, row.use
        counts[key] = counts.get(key, 0) + 1
        if limit is None or counts[key] <= limit:
            selected.append(row)
    return selected


def chunks(rows: Sequence[Row], kind: str, size: int = CHUNK) -> Iterator[tuple[str, list[Row]]]:
    """Chunks of a set's rows, each with a unique name."""
    of_set = [row for row in rows if row.set == kind]
    for start in range(0, len(of_set), size):
        part = of_set[start : start + size]
        yield f"{kind}-{hashlib.sha256(repr(part).encode()).hexdigest()[:8]}", part


class Alone:
    """A member as a single torch model on a device."""

    def __init__(self, member: Member, device: str) -> None:
        self.member, self.device = member, device
        self.model = (member.merged() if device == "cpu" else copy.deepcopy(member.merged()).to(device)).eval()
        self._size = member.vocabulary_size
        unused = [i for i in member.vocabulary.unused if i < self._size]
        self._unused = torch.tensor(unused, dtype=torch.long, device=device)

    def real(self, logits: Tensor) -> Tensor:
        """float32 logits of the ids that tokenizer and model both have."""
        return logits[..., : self._size].float().index_fill(-1, self._unused, -torch.inf)

    def encoded(self, row: Row) -> Encoded:
        return self.member.encoder.encode(check(row.prompt, False))

    def given(self, rows: Sequence[list[int]]) -> list[np.ndarray]:
        """The log-probabilities of all ids but the first, float32 (n - 1,) for each row."""
        results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
        order = sorted(range(len(rows)), key=lambda at: -len(rows[at]))
        room = PIECE if self.device != "cpu" else PIECE // 16
        start = 0
        while start < len(order):
            size = max(1, room // len(rows[order[start]]))
            group = order[start : start + size]
            start += size
            ids = torch.zeros(len(group), len(rows[group[0]]), dtype=torch.long)
            for at, number in enumerate(group):
                ids[at, : len(rows[number])] = torch.tensor(rows[number])
            ids = ids.to(self.device)  # padding after a row does not change its scores
            with torch.inference_mode():
                logits = self.real(self.model(input_ids=ids, use_cache=False).logits[:, :-1])
                scores = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            for number, row_scores in zip(group, scores.float().cpu().numpy(), strict=True):
                results[number] = row_scores[: len(rows[number]) - 1].copy()
        return results


SETS = ("rag", "lm", "choice")


def read(
    members: Sequence[Member], data: Path, out: Path, device: str, limit: int | None, sets: Sequence[str] = SETS
) -> None:
    """Compute all missing arrays of these sets."""
    rows = rows_of(data, limit)
    note(members, out)
    for member in members:
        alone = None
        for kind in sets:
            for name, part in chunks(rows, kind):
                path = out / f"{name}-{member.name}.npz"
                if path.exists():
                    continue
                alone = alone or Alone(member, device)
                started = time.perf_counter()
                count = _file(alone, part, path)
                told(f"{path.name}: {len(part)} rows, {count} tokens, {time.perf_counter() - started:.1f} s")
        del alone
    if "rag" in sets:
        pooled(members, rows, out, device)


def note(members: Sequence[Member], out: Path) -> None:
    """Write members.json, the members of these arrays.

    Raises:
        DataError: the folder has arrays of other members.
    """
    out.mkdir(parents=True, exist_ok=True)
    current = [{"name": m.name, "fingerprint": m.fingerprint, "vocabulary": m.vocabulary.family} for m in members]
    path = out / "members.json"
    if path.exists() and (stored := json.loads(path.read_text())) != current:
        names = ", ".join(one["name"] for one in stored)
        raise DataError(f"{out} has arrays of other members ({names}); give another folder")
    path.write_text(json.dumps(current, indent=1) + "\n")


def _file(alone: Alone, part: Sequence[Row], path: Path) -> int:
    """Compute and save the arrays of some rows: log-probabilities, spans, and the number of tokens of each prompt and
    text (and text alone), in this order."""
    encoder, vocabulary = alone.member.encoder, alone.member.vocabulary
    alone_prompt = encoder.encode(ALONE).ids
    sequences: list[list[int]] = []
    places: list[tuple[int, list[int]]] = []  # of each segment: its sequence, and the indices of its tokens in it
    spans: list[np.ndarray] = []
    for row in part:
        encoded = alone.encoded(row)
        continued = [encoder.continuation(text) for text in row.texts]
        places.append((len(sequences), encoded.positions))
        spans.append(np.array([encoded.starts, encoded.ends]).T.reshape(-1, 2))
        starts = [encoded.ids] * len(continued) + [alone_prompt] * (len(continued) if row.set == "choice" else 0)
        for start, ids, text in zip(starts, continued * 2, row.texts * 2, strict=False):
            places.append((len(sequences), list(range(len(start), len(start) + len(ids)))))
            token_offsets = offsets(text, [vocabulary.text_bytes(i) for i in ids])
            spans.append(np.array(token_offsets or ([0] * len(ids), [len(text)] * len(ids))).T.reshape(-1, 2))
            sequences.append([*start, *ids])
        if not continued:
            sequences.append(encoded.ids)
    logprobs = alone.given(sequences)
    segments = [logprobs[at][[i - 1 for i in tokens]] for at, tokens in places]
    arrays = {
        "logprobs": np.concatenate(segments),
        "counts": np.array([len(segment) for segment in segments], np.int32),
        "spans": np.concatenate(spans).astype(np.uint16),
    }
    save(path, arrays)
    return sum(map(len, sequences))


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Save arrays atomically."""
    with open(path.with_suffix(".part"), "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    path.with_suffix(".part").rename(path)


def load(rows: Sequence[Row], kind: str, out: Path, names: Sequence[str]) -> list[tuple[Row, list[Scores]]]:
    """The rows of a set that all these members have read, with each member's scores."""
    results = []
    for name, part in chunks(rows, kind):
        paths = [out / f"{name}-{member}.npz" for member in names]
        if all(path.exists() for path in paths):
            by_member = [_scores(path, part) for path in paths]
            results += [(row, [scores[at] for scores in by_member]) for at, row in enumerate(part)]
    return results


def _scores(path: Path, part: Sequence[Row]) -> list[Scores]:
    with np.load(path) as file:
        cuts = np.cumsum(file["counts"])[:-1]
        segments = np.split(file["logprobs"].astype(np.float64), cuts)
        spans = np.split(file["spans"].astype(int), cuts)
    results, at = [], 0
    for row in part:
        n = len(row.texts)
        own = slice(at + 1, at + 1 + n)
        alone_count = n if row.set == "choice" else 0
        alone = segments[at + 1 + n : at + 1 + n + alone_count]
        results.append(Scores(segments[at], spans[at], segments[own], spans[own], alone))
        at += 1 + n + alone_count
    return results


def pooled(members: Sequence[Member], rows: Sequence[Row], out: Path, device: str) -> None:
    """Compute weights and scores of POOLED for the questions with passages, over members with the first's
    vocabulary."""
    first = members[0].vocabulary
    alike = [member for member in members if member.vocabulary.same_as(first)]
    test = [row for row in rows if row.use == "test"]
    models: list[Alone] = []
    if device != "cpu":
        blocks.WORKSPACE = 2**28  # larger steps for an accelerator
    for name, part in chunks(test, "rag", 50):
        path = out / f"pool-{name}.npz"
        if path.exists():
            continue
        models = models or [Alone(member, device) for member in alike]
        started = time.perf_counter()
        weights, segments = [], []
        for row in part:
            row_weights, row_logprobs = _pooled(models, row)
            weights.append(row_weights)
            segments += row_logprobs
        arrays = {
            "weights": np.array(weights, np.float32),
            "logprobs": np.concatenate(segments).astype(np.float32),
            "counts": np.array([len(segment) for segment in segments], np.int32),
        }
        save(path, arrays)
        told(f"{path.name}: {len(part)} rows, {time.perf_counter() - started:.1f} s")


def _pooled(models: Sequence[Alone], row: Row) -> tuple[list[list[float]], list[np.ndarray]]:
    """Weights (len(POOLED), K), and the log-probabilities of the answer's tokens under each."""
    encoded = models[0].encoded(row)
    ids = torch.tensor([*encoded.ids, *models[0].member.encoder.continuation(row.texts[0])], device=models[0].device)
    with torch.inference_mode():
        every = [one.real(one.model(input_ids=ids[None], use_cache=False).logits[0, :-1]) for one in models]
    logits = torch.stack(every)
    scored_places = torch.tensor(encoded.positions) - 1
    targets = ids[1:].cpu()
    source = TensorSource(logits[:, scored_places.to(logits.device)], block=1024)
    weights, logprobs = [], []
    answer_logits = logits[:, len(encoded.ids) - 1 :]
    for name in POOLED:
        values = list(solve(name, source, targets[scored_places]).values)
        fused = (
            (torch.tensor(values).to(answer_logits)[:, None, None] * answer_logits.log_softmax(-1))
            .sum(0)
            .log_softmax(-1)
        )
        weights.append(values)
        logprobs.append(fused.gather(-1, ids[len(encoded.ids) :, None])[:, 0].float().cpu().numpy())
    return weights, logprobs


def load_pooled(rows: Sequence[Row], out: Path) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """{row id: {weighting: (weights (K,), log-probabilities of the answer's tokens)}}."""
    results: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, part in chunks([row for row in rows if row.use == "test"], "rag", 50):
        path = out / f"pool-{name}.npz"
        if not path.exists():
            continue
        with np.load(path) as file:
            segments = np.split(file["logprobs"].astype(np.float64), np.cumsum(file["counts"])[:-1])
            weights = file["weights"].astype(np.float64)
        for at, row in enumerate(part):
            results[row.id] = {n: (weights[at, j], segments[at * len(POOLED) + j]) for j, n in enumerate(POOLED)}
    return results


def told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
