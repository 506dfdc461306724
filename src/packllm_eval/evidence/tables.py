"""Tables of all methods, made from the arrays."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packllm_eval.evidence import passages, reading
from packllm_eval.evidence.methods import (
    Method,
    adapting,
    answers_together,
    dropped,
    em,
    likelihood,
    methods,
    nll,
    priors,
    together,
    weights_of,
)
from packllm_eval.evidence.races import raced
from packllm_eval.evidence.reading import Row, Scores
from packllm_eval.evidence.show import table, versus
from packllm_eval.evidence.texts import f1, holds, repeated
from packllm_eval.statistics import proportion

PROMPTS = (32, 128, 256)
"""Prompt lengths in tokens of a document."""

REST = 256
"""Tokens after the prompt that are predicted, at most; documents with less than a quarter of it are left out."""

ASLEEP, BLOCK = 0.05, 8

THRESHOLDS, BLOCKS = (0.02, 0.05, 0.1), (8, 12, 16, 24, 32)
"""What members may sleep below, and for how many tokens."""

Pair = tuple[Row, list[Scores]]


def told(data: Path, out: Path, limit: int | None) -> str:
    """All tables for which there are arrays, in Markdown."""
    members = json.loads((out / "members.json").read_text())
    rows = reading.rows_of(data, limit)
    alike = [one["name"] for one in members if one["vocabulary"] == members[0]["vocabulary"]]
    all_names = [one["name"] for one in members]
    families = [one["vocabulary"] for one in members]
    parts = [*rag(rows, out, alike, families[0]), *passages.tables(data, out, limit)]
    for names in [alike, all_names] if len(all_names) > len(alike) else [alike]:
        families_of_names = [families[all_names.index(name)] for name in names]
        scored = reading.load(rows, "lm", out, names)
        parts += language(scored, names, families_of_names)
        if names is alike:
            parts += sleeping(rows, out, names, families[0])
    parts += raced(to_race(rows, out, alike, families[0]), "RAG questions")
    parts += choice(reading.load(rows, "choice", out, alike), alike, families[0])
    return "\n\n".join(parts)


# Answers to questions with passages


def rag(rows: Sequence[Row], out: Path, names: Sequence[str], family: str) -> Iterator[str]:
    scored = reading.load(rows, "rag", out, names)
    families = [family] * len(names)
    pooled = reading.load_pooled(rows, out)
    test = [pair for pair in scored if pair[0].use == "test" and pair[0].id in pooled]
    if not test:
        return
    known_priors = priors([(r, answers_together(r, s, families)[0]) for r, s in scored if r.use == "calibrate"])
    nats = {m.label: rag_nats(m, names, test, known_priors, pooled) for m in methods(names)}
    corpora = list(dict.fromkeys(row.corpus for row, _ in test))
    places = {corpus: [at for at, (row, _) in enumerate(test) if row.corpus == corpus] for corpus in corpora}
    alone_nats = {name: nats[f"member {name}"] for name in names}
    best = {c: min(names, key=lambda name: alone_nats[name][places[c]].sum()) for c in corpora}
    nats["best member in hindsight"] = np.array([alone_nats[best[r.corpus]][at] for at, (r, _) in enumerate(test)])
    sizes = np.array([len(scores[0].texts[0]) for _, scores in test])
    octets = np.array([len(row.texts[0].encode()) for row, _ in test])
    lines = []
    for label, values in sorted(nats.items(), key=lambda item: item[1].sum()):
        cells = [f"{values[at].sum() / sizes[at].sum():.4f}" for at in places.values()]
        against = [versus(values, nats[b], sizes) for b in ("em", "best member in hindsight")]
        total = f"{values.sum() / sizes.sum():.4f}", f"{values.sum() / octets.sum() / np.log(2):.4f}"
        lines.append([label, *cells, *total, *against])
    counts = ", ".join(f"{corpus} {len(places[corpus])} (best: {best[corpus]})" for corpus in corpora)
    weights = "; ".join(
        f"{n} " + " ".join(f"{k} {v:.2f}" for k, v in zip(names, w, strict=True)) for n, w in known_priors.items()
    )
    headings = ["method", *corpora, "nats/token", "bits/byte", "against em", "against the best member"]
    yield f"## RAG answers\n\n{len(test)} questions: {counts}. Priors: {weights}.\n\n{table(headings, lines)}"
    yield from per_corpus(nats, places, sizes)
    yield from written(test, out, names)


def rag_nats(method: Method, names: Sequence[str], test: Sequence[Pair], known_priors: Any, pooled: Any) -> np.ndarray:
    """NLL of each gold answer in nats."""
    if method.pool == "log":
        return np.array([-pooled[row.id][method.weighting][1].sum() for row, _ in test])
    prompts = [np.stack([one.prompt for one in scores]) for _, scores in test]
    weights = [weights_of(method, names, row, p, known_priors) for (row, _), p in zip(test, prompts, strict=True)]
    return nll(np.stack(weights), [np.stack([one.texts[0] for one in scores]) for _, scores in test], method.adapt)


def per_corpus(nats: dict[str, np.ndarray], places: dict[str, list[int]], sizes: np.ndarray) -> Iterator[str]:
    """Each pack against the best single member in hindsight, by domain."""
    lines = []
    for label in ("em", "em + prior (pooled)", "em + prior (own)", "em + adapt", "em + prior (own) + adapt"):
        best = nats["best member in hindsight"]
        lines.append([label, *(versus(nats[label][at], best[at], sizes[at]) for at in places.values())])
    yield "Against the best member in hindsight, nats a token:\n\n" + table(["method", *places], lines)


def written(test: Sequence[Pair], out: Path, names: Sequence[str]) -> Iterator[str]:
    """The table of greedy answers, if there are any. Those of few questions are compared with em on the same."""
    path = out / "answers.jsonl"
    if not path.exists():
        return
    gold = {row.id: row.texts[0] for row, _ in test}
    prompts = {row.id: len(scores[0].prompt) for row, scores in test}
    by: dict[str, dict[str, dict]] = {}
    for line in path.read_text("utf-8").splitlines():
        one = json.loads(line)
        if one["id"] in gold:
            by.setdefault(one["method"], {})[one["id"]] = one
    f1s = {label: {i: f1(one["text"], gold[i]) for i, one in by_id.items()} for label, by_id in by.items()}
    lines = []
    for label in sorted(by, key=lambda label: (-len(by[label]), -np.mean([*f1s[label].values()]))):
        ids = [i for i in by[label] if i in by["em"]]
        own, em_own = (np.array([f1s[name][i] for i in ids]) for name in (label, "em"))
        one = [by[label][i] for i in ids]
        held = proportion([holds(o["text"], gold[i]) for i, o in zip(ids, one, strict=True)])
        repetition = np.mean([repeated(o["text"]) for o in one])
        members = 1 if label.startswith("member ") else len(names)
        tokens_read = np.mean(
            [prompts[i] * members + o["tokens"] * o["running"] for i, o in zip(ids, one, strict=True)]
        )
        seconds = np.mean([o["seconds"] for o in one])
        gold_share = f"{held.value:.3f} [{held.low:.3f}, {held.high:.3f}]"
        figures = f"{repetition:.4f}", f"{seconds:.3f}", f"{tokens_read:.0f}"
        lines.append([label, str(len(ids)), f"{own.mean():.4f}", versus(own, em_own), gold_share, *figures])
    headings = ["method", "questions", "F1", "against em on the same", "holds the gold answer", "repeated 3-grams"]
    yield f"### Greedy answers\n\n{table([*headings, 's', 'tokens read'], lines)}"


# Language modelling


def language(scored: Sequence[Pair], names: Sequence[str], families: Sequence[str]) -> Iterator[str]:
    """The effect of `adapt` and of sleeping members, by length of the prompt. Even documents are for choosing settings,
    odd ones for the report."""
    unit = "token" if len({*families}) == 1 else "word"
    lines = []
    for length in PROMPTS:
        fit = long_enough(scored, families, length)
        for at, half in enumerate(("choose", "report")):
            for kind, group in pure_and_mixed(fit[at::2]):
                if group:
                    lines.append([str(length), half, kind, str(len(group)), *compared(group)])
    if lines:
        headings = ["prompt", "half", "text", "documents", "em, bits/byte", "uniform", "top1", "+ adapt", "+ sleeping"]
        headings += ["members run a " + unit, f"em, min_weight {ASLEEP:g}"]
        yield f"## Language modelling, {unit}s of {', '.join(names)}\n\n{table(headings, lines)}"


def long_enough(scored: Sequence[Pair], families: Sequence[str], length: int) -> list[Any]:
    """(row, *at_length()) of the documents that go on for long enough after so many tokens."""
    least = REST // 4 // (1 if len({*families}) == 1 else 2)
    cut = [(row, *at_length(row, scores, families, length)) for row, scores in scored]
    return [one for one in cut if one[2].shape[1] >= least]


def sleeping(rows: Sequence[Row], out: Path, names: Sequence[str], family: str) -> Iterator[str]:
    """The effect of sleeping members by block and threshold, on answers and on the odd documents."""
    scored, lines = reading.load(rows, "lm", out, names), []
    texts_of = {"RAG answers": gold(rows, out, names, family)}
    texts_of |= {f"after {size}": long_enough(scored, [family] * len(names), size)[1::2] for size in PROMPTS}
    for heading, found in texts_of.items():
        if not found:
            continue
        weights = np.stack([dropped(em(prompt)) for _, prompt, _, _ in found])
        texts, sizes = [text for _, _, text, _ in found], np.array([size for *_, size in found])
        mixed = np.array([row.corpus == "mixed" for row, *_ in found])
        still, moved = (nll(weights, texts, adapt) / np.log(2) for adapt in (False, True))
        running = adapting(weights, texts)[1]
        for block, threshold in itertools.product(BLOCKS, THRESHOLDS):
            nats, run = adapting(weights, texts, threshold, block)
            bits = nats / np.log(2)
            cells = [versus(bits[at], moved[at], sizes[at], 5) if at.any() else "" for at in (~mixed, mixed)]
            cells += [versus(bits, moved, sizes, 5), versus(bits, still, sizes, 5)]
            figures = f"{running:.2f}", f"{run:.2f}", f"{(running - run) / block:.3f}"
            lines.append([heading, str(block), f"{threshold:g}", *cells, *figures])
    if lines:
        headings = ["text", "block", "θ", "pure, against adapt", "mixed, against adapt", "all, against adapt"]
        headings += ["all, against em", "members run without", "members run", "passes that catch up, a token"]
        yield f"## Members that sleep\n\nBits per byte; {', '.join(names)}.\n\n{table(headings, lines)}"


def pure_and_mixed(rows: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    mixed = [one for one in rows if one[0].corpus == "mixed"]
    return [("pure", [one for one in rows if one[0].corpus != "mixed"]), ("mixed", mixed), ("all", list(rows))]


def at_length(
    row: Row, scores: Sequence[Scores], families: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of a document: log-probabilities (K, n) of its first `length` tokens (of the first member), (K, m) of the text
    that follows, and the bytes of the latter."""
    matrix, spans = together(row, scores, families)
    ends = scores[0].spans[:, 1]
    start = ends[min(length, len(ends)) - 1]
    stop = ends[min(length + REST, len(ends)) - 1]
    first, last = np.searchsorted(spans[:, 1], [start, stop], side="right")
    text = row.prompt[int(start) : int(stop)]
    return matrix[:, :first], matrix[:, first:last], max(1, len(text.encode()))


def gold(rows: Sequence[Row], out: Path, names: Sequence[str], family: str) -> list[Any]:
    """(row, log-probabilities (K, n) of the prompt, (K, m) of the gold answer, its bytes) of the questions with
    passages."""
    families = [family] * len(names)
    return [
        (r, together(r, s, families)[0], answers_together(r, s, families)[0], len(r.texts[0].encode()))
        for r, s in reading.load(rows, "rag", out, names)
        if r.use == "test"
    ]


def to_race(
    rows: Sequence[Row], out: Path, names: Sequence[str], family: str
) -> dict[str, list[tuple[np.ndarray, np.ndarray, int]]]:
    """What members race on, with what follows and its bytes: questions with passages, and the first 256 tokens of the
    documents that language() reports on."""
    families = [family] * len(names)
    found = {"RAG questions": [one[1:] for one in gold(rows, out, names, family)]}
    fit = long_enough(reading.load(rows, "lm", out, names), families, PROMPTS[-1])[1::2]
    found |= {f"{kind} documents": [one[1:] for one in part] for kind, part in pure_and_mixed(fit) if kind != "all"}
    return {heading: part for heading, part in found.items() if part}


def compared(rows: Sequence[Any]) -> list[str]:
    """The cells of a line: bits per byte, and differences from em."""
    sizes = np.array([size for *_, size in rows])
    texts = [text for _, _, text, _ in rows]
    full = [em(prompt) for _, prompt, _, _ in rows]
    weights_ = np.stack([dropped(weights) for weights in full])
    best = np.array([prompt.sum(1).argmax() for _, prompt, _, _ in rows])
    asleep, running = adapting(weights_, texts, ASLEEP, BLOCK)
    nats = {
        "em": nll(weights_, texts),
        "uniform": nll(np.full_like(weights_, 1 / weights_.shape[1]), texts),
        "top1": nll(np.eye(weights_.shape[1])[best], texts),
        "adapt": nll(weights_, texts, True),
        "sleeping": asleep,
        "least": nll(np.stack([dropped(weights, ASLEEP) for weights in full]), texts),
    }
    bits = {name: values / np.log(2) for name, values in nats.items()}
    difference = {name: versus(bits[name], bits["em"], sizes) for name in bits}
    return [
        f"{bits['em'].sum() / sizes.sum():.4f}",
        difference["uniform"],
        difference["top1"],
        difference["adapt"],
        difference["sleeping"],
        f"{running:.2f}",
        difference["least"],
    ]


# Multiple choice


def choice(scored: Sequence[Pair], names: Sequence[str], family: str) -> Iterator[str]:
    """Accuracy of two ratings of choices: log-likelihood per byte, and the same minus half of that without the
    question."""
    test = [pair for pair in scored if pair[0].use == "test"]
    if not test:
        return
    known_priors = priors([(r, right_answer(r, s)) for r, s in scored if r.use == "calibrate"])
    selected = [m for m in methods(names) if m.pool == "linear" and not m.adapt and m.prior != "own"]
    hits: dict[tuple[str, str], np.ndarray] = {}
    for method in selected:
        for half in (0.0, 0.5):
            right = [rated(method, names, row, s, known_priors, half) == row.answer for row, s in test]
            hits[method.label, "half-PMI per byte" if half else "per byte"] = np.array(right, float)
    corpora = list(dict.fromkeys(row.corpus for row, _ in test))
    places = {corpus: [at for at, (row, _) in enumerate(test) if row.corpus == corpus] for corpus in corpora}
    lines = []
    for (label, rating), values in sorted(hits.items(), key=lambda item: -item[1].mean()):
        share = proportion([bool(v) for v in values])
        against = [versus(values, hits["em", rating], places=3)]
        against.append(versus(values, hits[label, "per byte"], places=3))
        cells = [f"{values[at].mean():.3f}" for at in places.values()]
        lines.append([label, rating, *cells, f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]", *against])
    halves = [[at for at in range(len(test)) if at % 2 == half] for half in (0, 1)]
    gains = [versus(hits["em", "half-PMI per byte"][at], hits["em", "per byte"][at], places=3) for at in halves]
    headings = ["method", "rating", *corpora, "all", "against em, same rating", "against per byte"]
    yield (
        f"## Multiple choice\n\n{len(test)} questions, prior from {len(scored) - len(test)} others. Half-PMI against "
        f"per byte under em, on the even questions {gains[0]}, on the odd ones {gains[1]}.\n\n{table(headings, lines)}"
    )


def right_answer(row: Row, scores: Sequence[Scores]) -> np.ndarray:
    return np.stack([one.texts[row.answer] for one in scores])


def rated(
    method: Method, names: Sequence[str], row: Row, scores: Sequence[Scores], known_priors: Any, half: float
) -> int:
    """The choice with the highest rating; the earlier among equals."""
    weights = weights_of(method, names, row, np.stack([one.prompt for one in scores]), known_priors)
    ratings = []
    for at, text in enumerate(row.texts):
        conditional = likelihood(weights, np.stack([one.texts[at] for one in scores])).sum()
        unconditional = likelihood(weights, np.stack([one.alone[at] for one in scores])).sum() if half else 0.0
        ratings.append((conditional - half * unconditional) / len(text.encode()))
    return int(np.argmax(ratings))
