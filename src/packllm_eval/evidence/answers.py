"""Greedy answers to questions with passages under all methods, by batches of plain transformers models."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from packllm.engines.member import Member
from packllm.errors import DataError
from packllm.weights.adaptive import Adaptive
from packllm_eval.evidence import reading
from packllm_eval.evidence.methods import Method, answers_together, methods, priors, together, weights_of
from packllm_eval.evidence.reading import Alone, Row, told

MAX_TOKENS = 64


def answer(
    members: Sequence[Member],
    data: Path,
    out: Path,
    device: str,
    limit: int | None,
    batch: int,
    count: int | None = None,
) -> None:
    """Append to answers.jsonl: {"id", "method", "text", "tokens", "running", "seconds"} per line; keep existing
    lines.

    Args:
        limit: as the arrays were read with.
        batch: prompts answered together.
        count: the first so many questions of each corpus; None: all.
    """
    alike = [member for member in members if member.vocabulary.same_as(members[0].vocabulary)]
    names = [member.name for member in alike]
    rows = reading.rows_of(data, limit)
    families = [member.vocabulary.family for member in alike]
    scored = reading.load(rows, "rag", out, names)
    pooled = reading.load_pooled(rows, out)
    known_priors = priors([(r, answers_together(r, s, families)[0]) for r, s in scored if r.use == "calibrate"])
    test = [(row, scores) for row, scores in scored if row.use == "test" and row.id in pooled]
    if not test:
        raise DataError(f"{out} has no arrays of these questions; run `read` first, with the same --limit")
    test.sort(key=lambda pair: number(pair[0]))  # each batch has rows of all corpora
    test = [pair for pair in test if count is None or number(pair[0]) < count]
    path = out / "answers.jsonl"
    existing = {(one["id"], one["method"]) for one in lines_of(path)}
    models: list[Alone] = []
    for start in range(0, len(test), batch):
        group = test[start : start + batch]
        missing = [m for m in methods(names) if any((row.id, m.label) not in existing for row, _ in group)]
        if not missing:
            continue
        models = models or [Alone(member, device) for member in alike]
        prompts = Prompts(models, [row for row, _ in group])
        for method in missing:
            weights = np.stack(
                [
                    weights_of(method, names, r, together(r, s, families)[0], known_priors, pooled[r.id])
                    for r, s in group
                ]
            )
            started = time.perf_counter()
            texts = prompts.greedy(method, weights)
            seconds = time.perf_counter() - started
            with open(path, "a", encoding="utf-8") as file:
                for (row, _), (text, tokens), w in zip(group, texts, weights, strict=True):
                    line = {"id": row.id, "method": method.label, "text": text, "tokens": tokens}
                    line |= {"running": int((w > 0).sum()), "seconds": seconds / len(group)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            told(f"{method.label}: {len(group)} answers, {seconds:.1f} s, {texts[0][0][:60]!r}")


def number(row: Row) -> int:
    """Which question of its corpus a row is."""
    return int(row.id.rpartition("-")[2])


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


class Prompts:
    """A batch of prompts, read once by all members. Each call of greedy() starts at their end."""

    def __init__(self, models: Sequence[Alone], rows: Sequence[Row]) -> None:
        self._models, self._device = models, models[0].device
        self._tokenizer = models[0].member.tokenizer
        ids = [models[0].encoded(row).ids for row in rows]
        self._length = max(map(len, ids))
        padded = torch.zeros(len(rows), self._length, dtype=torch.long)
        self._mask = torch.zeros(len(rows), self._length, dtype=torch.long)
        for at, row in enumerate(ids):
            padded[at, self._length - len(row) :] = torch.tensor(row)
            self._mask[at, self._length - len(row) :] = 1
        self._mask = self._mask.to(self._device)
        places = (self._mask.cumsum(-1) - 1).clamp_min(0)
        self._caches, self._first = [], []
        for one in models:
            with torch.inference_mode():
                output = one.model(
                    input_ids=padded.to(self._device),
                    attention_mask=self._mask,
                    position_ids=places,
                    use_cache=True,
                    logits_to_keep=1,
                )
            self._caches.append(output.past_key_values)
            self._first.append(one.real(output.logits[:, -1]).log_softmax(-1))

    def greedy(self, method: Method, weights: np.ndarray) -> list[tuple[str, int]]:
        """(text, tokens) of each prompt's answer under weights (rows, K)."""
        used = [k for k in range(weights.shape[1]) if weights[:, k].any()]
        ends = torch.tensor(sorted(self._models[0].member.end_ids), device=self._device)
        state = Adaptive(weights[:, used]) if method.adapt else None
        current = torch.from_numpy(weights[:, used]).to(self._device)
        rows = [self._first[k] for k in used]
        done = torch.zeros(len(weights), dtype=torch.bool, device=self._device)
        written: list[list[int]] = [[] for _ in weights]
        for at in range(MAX_TOKENS):
            tokens = _fused(rows, current, method.pool).argmax(-1)
            done |= torch.isin(tokens, ends)
            for row, (token, is_done) in enumerate(zip(tokens.tolist(), done.tolist(), strict=True)):
                if not is_done:
                    written[row].append(token)
            if done.all() or at == MAX_TOKENS - 1:
                break
            if state is not None:
                p = torch.stack([row.gather(-1, tokens[:, None])[:, 0] for row in rows], -1).double().exp()
                state.observe(p.cpu().numpy())
                current = torch.from_numpy(state.weights()).to(self._device)
            rows = self._step(used, tokens, at)
        for k in used:
            if extra := self._caches[k].get_seq_length() - self._length:
                self._caches[k].crop(-extra)  # negative: the number of tokens to remove
        return [(self._tokenizer.decode(ids, skip_special_tokens=True), len(ids)) for ids in written]

    def _step(self, used: Sequence[int], tokens: Tensor, at: int) -> list[Tensor]:
        """Log-probabilities (rows, V) of each used member, after the answers' token `at`."""
        mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), at + 1)], -1)
        places = self._mask.sum(-1, keepdim=True) + at
        logprobs = []
        for k in used:
            with torch.inference_mode():
                output = self._models[k].model(
                    input_ids=tokens[:, None],
                    attention_mask=mask,
                    position_ids=places,
                    past_key_values=self._caches[k],
                    use_cache=True,
                )
            logprobs.append(self._models[k].real(output.logits[:, -1]).log_softmax(-1))
        return logprobs


def _fused(rows: Sequence[Tensor], weights: Tensor, pool: str) -> Tensor:
    """Values (rows, V) in the order of the fused probabilities."""
    total: Tensor | None = None
    for k, row in enumerate(rows):
        scale = weights[:, k, None].to(row)
        part = scale * (row.exp() if pool == "linear" else row.clamp_min(-1e30))
        total = part if total is None else total + part
    assert total is not None
    return total
