"""Tables of all methods, from the arrays alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from packllm_eval.evidence import reading
from packllm_eval.evidence.methods import (
    Method,
    adapting,
    answers_together,
    dropped,
    em,
    likelihood,
    methods,
    priors,
    racing,
    together,
    weights_of,
)
from packllm_eval.evidence.reading import Row, Scores
from packllm_eval.statistics import interval, proportion

PROMPTS = (32, 128, 256)
"""Tokens of a document that its weights are from."""

REST = 256
"""Most tokens after them that are predicted; at least a quarter of it."""

LEASTS = (0.01, 0.03, 0.05, 0.1)
ASLEEP, BLOCK = 0.05, 8
FIRST = 256

Pair = tuple[Row, list[Scores]]


def told(data: Path, out: Path, limit: int | None) -> str:
    """All tables that there are arrays for, in Markdown."""
    members = json.loads((out / "members.json").read_text())
    rows = reading.rows_of(data, limit)
    alike = [one["name"] for one in members if one["vocabulary"] == members[0]["vocabulary"]]
    everybody = [one["name"] for one in members]
    families = [one["vocabulary"] for one in members]
    parts = list(rag(rows, out, alike, families[0]))
    for names in [alike, everybody] if len(everybody) > len(alike) else [alike]:
        own = [families[everybody.index(name)] for name in names]
        parts += language(reading.load(rows, "lm", out, names), names, own)
    parts += choice(reading.load(rows, "choice", out, alike), alike, families[0])
    return "\n\n".join(parts)


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *lines]])


def versus(a: np.ndarray, b: np.ndarray, sizes: np.ndarray | None = None, places: int = 4) -> str:
    """a − b on the same rows, with a 95 % bootstrap interval."""
    found = interval((a - b).tolist(), None if sizes is None else sizes.tolist())
    return f"{found.value:+.{places}f} [{found.low:+.{places}f}, {found.high:+.{places}f}]"


# Answers to questions with passages


def rag(rows: Sequence[Row], out: Path, names: Sequence[str], family: str) -> Iterator[str]:
    found = reading.load(rows, "rag", out, names)
    families = [family] * len(names)
    pooled = reading.load_pooled(rows, out)
    test = [pair for pair in found if pair[0].use == "test" and pair[0].id in pooled]
    if not test:
        return
    known = priors([(r, answers_together(r, s, families)[0]) for r, s in found if r.use == "calibrate"])
    nats = {m.label: rag_nats(m, names, test, known, pooled) for m in methods(names)}
    corpora = list(dict.fromkeys(row.corpus for row, _ in test))
    here = {corpus: [at for at, (row, _) in enumerate(test) if row.corpus == corpus] for corpus in corpora}
    alone = {name: nats[f"member {name}"] for name in names}
    best = {c: min(names, key=lambda name: alone[name][here[c]].sum()) for c in corpora}
    nats["best member in hindsight"] = np.array([alone[best[r.corpus]][at] for at, (r, _) in enumerate(test)])
    sizes = np.array([len(scores[0].texts[0]) for _, scores in test])
    octets = np.array([len(row.texts[0].encode()) for row, _ in test])
    lines = []
    for label, values in sorted(nats.items(), key=lambda item: item[1].sum()):
        cells = [f"{values[at].sum() / sizes[at].sum():.4f}" for at in here.values()]
        against = [versus(values, nats[b], sizes) for b in ("em", "best member in hindsight")]
        total = f"{values.sum() / sizes.sum():.4f}", f"{values.sum() / octets.sum() / np.log(2):.4f}"
        lines.append([label, *cells, *total, *against])
    counted = ", ".join(f"{corpus} {len(here[corpus])} (best: {best[corpus]})" for corpus in corpora)
    weights = "; ".join(
        f"{n} " + " ".join(f"{k} {v:.2f}" for k, v in zip(names, w, strict=True)) for n, w in known.items()
    )
    headings = ["method", *corpora, "nats/token", "bits/byte", "against em", "against the best member"]
    yield f"## RAG answers\n\n{len(test)} questions: {counted}. Priors: {weights}.\n\n{table(headings, lines)}"
    yield from per_corpus(nats, here, sizes)
    yield from written(test, out, names)
    yield from raced(test, families)


def rag_nats(method: Method, names: Sequence[str], test: Sequence[Pair], known: Any, pooled: Any) -> np.ndarray:
    """NLL of each gold answer."""
    if method.pool == "log":
        return np.array([-pooled[row.id][method.weighting][1].sum() for row, _ in test])
    prompts = [np.stack([one.prompt for one in scores]) for _, scores in test]
    found = [weights_of(method, names, row, p, known) for (row, _), p in zip(test, prompts, strict=True)]
    return nll(np.stack(found), [np.stack([one.texts[0] for one in scores]) for _, scores in test], method.adapt)


def nll(weights: np.ndarray, texts: Sequence[np.ndarray], adapt: bool = False) -> np.ndarray:
    """Nats of each text (K, n), under weights (rows, K)."""
    if adapt:
        return adapting(weights, texts)[0]
    return np.array([-likelihood(w, text).sum() for w, text in zip(weights, texts, strict=True)])


def per_corpus(nats: dict[str, np.ndarray], here: dict[str, list[int]], sizes: np.ndarray) -> Iterator[str]:
    """Each pack against the best single member in hindsight, domain by domain."""
    lines = []
    for label in ("em", "em + prior (pooled)", "em + prior (own)", "em + adapt", "em + prior (own) + adapt"):
        best = nats["best member in hindsight"]
        lines.append([label, *(versus(nats[label][at], best[at], sizes[at]) for at in here.values())])
    yield "Against the best member in hindsight, nats a token:\n\n" + table(["method", *here], lines)


def written(test: Sequence[Pair], out: Path, names: Sequence[str]) -> Iterator[str]:
    """Greedy answers, as far as there are any."""
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
    ids = [id_ for id_ in gold if all(id_ in found for found in by.values())]
    f1s = {label: np.array([f1(found[i]["text"], gold[i]) for i in ids]) for label, found in by.items()}
    lines = []
    for label in sorted(by, key=lambda label: -f1s[label].mean()):
        one = [by[label][i] for i in ids]
        holds = proportion([same(gold[i]) in same(o["text"]) for i, o in zip(ids, one, strict=True)])
        again = np.mean([repeated(o["text"]) for o in one])
        members = 1 if label.startswith("member ") else len(names)
        read = np.mean([prompts[i] * members + o["tokens"] * o["running"] for i, o in zip(ids, one, strict=True)])
        seconds = np.mean([o["seconds"] for o in one])
        against = versus(f1s[label], f1s["em"])
        held = f"{holds.value:.3f} [{holds.low:.3f}, {holds.high:.3f}]"
        figures = f"{again:.4f}", f"{seconds:.3f}", f"{read:.0f}"
        lines.append([label, f"{f1s[label].mean():.4f}", against, held, *figures])
    headings = ["method", "F1", "against em", "holds the gold answer", "repeated 3-grams", "s", "tokens read"]
    yield f"### Greedy answers\n\n{len(ids)} questions.\n\n{table(headings, lines)}"


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def same(text: str) -> str:
    return " ".join(words(text))


def f1(given: str, gold: str) -> float:
    """Of the words, as in SQuAD."""
    a, b = Counter(words(given)), Counter(words(gold))
    both = sum((a & b).values())
    return 2 * both / (sum(a.values()) + sum(b.values())) if both else 0.0


def repeated(text: str) -> float:
    """Share of word 3-grams that occurred before."""
    found = words(text)
    grams = [*zip(found, found[1:], found[2:], strict=False)]
    return 1 - len({*grams}) / len(grams) if grams else 0.0


def raced(test: Sequence[Pair], families: Sequence[str]) -> Iterator[str]:
    """Racing prefill: what is read, and what that costs in likelihood, with and without adapt."""
    lines, octets = [], np.array([len(row.texts[0].encode()) for row, _ in test])
    answers = [answers_together(row, scores, families)[0] for row, scores in test]
    prompts = [together(row, scores, families)[0] for row, scores in test]
    whole = [em(prompt) for prompt in prompts]
    for least in LEASTS:
        left, shares = zip(*(racing(prompt, least, FIRST) for prompt in prompts), strict=True)
        lost = sum(not some[full.argmax()] for some, full in zip(left, whole, strict=True))
        known = np.stack([dropped(full, least) for full in whole])
        ran = np.zeros_like(known)
        for row, (some, prompt) in enumerate(zip(left, prompts, strict=True)):
            ran[row, some] = whole[row] if some.all() else em(prompt[some])
            ran[row] = dropped(ran[row], least)
        for adapt in (False, True):
            raced_bits, all_bits = (nll(weights, answers, adapt) / np.log(2) for weights in (ran, known))
            loss = versus(raced_bits, all_bits, octets, places=5)
            lines.append([f"{least:g}", "yes" if adapt else "no", f"{np.mean(shares):.3f}", loss, str(lost)])
    headings = ["min_weight", "adapt", "tokens read", "bits/byte against all read", "best member dropped"]
    yield f"### Racing prefill\n\nFirst chunk {FIRST} tokens, then as many each time.\n\n{table(headings, lines)}"


# Language modelling


def language(found: Sequence[Pair], names: Sequence[str], families: Sequence[str]) -> Iterator[str]:
    """em with adapt and without, and with members that sleep, by length of the prompt: half of the documents (the even
    ones) is to choose on, the other half is reported."""
    unit = "token" if len({*families}) == 1 else "word"
    lines = []
    for length in PROMPTS:
        cut = [(row, *at_length(row, scores, families, length)) for row, scores in found]
        fit = [(row, p, a, size) for row, p, a, size in cut if a.shape[1] >= REST // 4 // (1 if unit == "token" else 2)]
        for half in ("choose", "report"):
            part = [one for at, one in enumerate(fit) if at % 2 == (half == "report")]
            for kind, chosen in pure_and_mixed(part):
                if chosen:
                    lines.append([str(length), half, kind, str(len(chosen)), *compared(chosen)])
    if lines:
        headings = ["prompt", "half", "text", "documents", "em, bits/byte", "uniform", "top1", "+ adapt", "+ sleeping"]
        headings += ["members run a " + unit, f"em, min_weight {ASLEEP:g}"]
        yield f"## Language modelling, {unit}s of {', '.join(names)}\n\n{table(headings, lines)}"


def pure_and_mixed(found: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    mixed = [one for one in found if one[0].corpus == "mixed"]
    return [("pure", [one for one in found if one[0].corpus != "mixed"]), ("mixed", mixed), ("all", list(found))]


def at_length(
    row: Row, scores: Sequence[Scores], families: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(K, n) of a document's first `length` tokens (of the first member), (K, m) of what follows, and its bytes."""
    matrix, spans = together(row, scores, families)
    ends = scores[0].spans[:, 1]
    start = ends[min(length, len(ends)) - 1]
    stop = ends[min(length + REST, len(ends)) - 1]
    first, last = np.searchsorted(spans[:, 1], [start, stop], side="right")
    text = row.prompt[int(start) : int(stop)]
    return matrix[:, :first], matrix[:, first:last], max(1, len(text.encode()))


def compared(found: Sequence[Any]) -> list[str]:
    """The cells of a line: bits per byte, and differences to em."""
    sizes = np.array([size for *_, size in found])
    texts = [text for _, _, text, _ in found]
    full = [em(prompt) for _, prompt, _, _ in found]
    kept = np.stack([dropped(weights) for weights in full])
    best = np.array([prompt.sum(1).argmax() for _, prompt, _, _ in found])
    asleep, run = adapting(kept, texts, ASLEEP, BLOCK)
    nats = {
        "em": nll(kept, texts),
        "uniform": nll(np.full_like(kept, 1 / kept.shape[1]), texts),
        "top1": nll(np.eye(kept.shape[1])[best], texts),
        "adapt": nll(kept, texts, True),
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
        f"{run:.2f}",
        difference["least"],
    ]


# Multiple choice


def choice(found: Sequence[Pair], names: Sequence[str], family: str) -> Iterator[str]:
    """Accuracy by what choices are rated on: their likelihood per byte, less half of what they have alone."""
    test = [pair for pair in found if pair[0].use == "test"]
    if not test:
        return
    known = priors([(r, right_answer(r, s)) for r, s in found if r.use == "calibrate"])
    chosen = [m for m in methods(names) if m.pool == "linear" and not m.adapt and m.prior != "own"]
    hits: dict[tuple[str, str], np.ndarray] = {}
    for method in chosen:
        for half in (0.0, 0.5):
            right = [rated(method, names, row, s, known, half) == row.answer for row, s in test]
            hits[method.label, "half-PMI per byte" if half else "per byte"] = np.array(right, float)
    corpora = list(dict.fromkeys(row.corpus for row, _ in test))
    here = {corpus: [at for at, (row, _) in enumerate(test) if row.corpus == corpus] for corpus in corpora}
    lines = []
    for (label, rating), values in sorted(hits.items(), key=lambda item: -item[1].mean()):
        share = proportion([bool(v) for v in values])
        against = [versus(values, hits["em", rating], places=3)]
        against.append(versus(values, hits[label, "per byte"], places=3))
        cells = [f"{values[at].mean():.3f}" for at in here.values()]
        lines.append([label, rating, *cells, f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]", *against])
    halves = [[at for at in range(len(test)) if at % 2 == half] for half in (0, 1)]
    gains = [versus(hits["em", "half-PMI per byte"][at], hits["em", "per byte"][at], places=3) for at in halves]
    headings = ["method", "rating", *corpora, "all", "against em, same rating", "against per byte"]
    yield (
        f"## Multiple choice\n\n{len(test)} questions, prior from {len(found) - len(test)} others. Half-PMI against "
        f"per byte under em, on the even questions {gains[0]}, on the odd ones {gains[1]}.\n\n{table(headings, lines)}"
    )


def right_answer(row: Row, scores: Sequence[Scores]) -> np.ndarray:
    return np.stack([one.texts[row.answer] for one in scores])


def rated(method: Method, names: Sequence[str], row: Row, scores: Sequence[Scores], known: Any, half: float) -> int:
    """The choice with the highest rating; ties go to the earlier."""
    weights = weights_of(method, names, row, np.stack([one.prompt for one in scores]), known)
    ratings = []
    for at, text in enumerate(row.texts):
        given = likelihood(weights, np.stack([one.texts[at] for one in scores])).sum()
        alone = likelihood(weights, np.stack([one.alone[at] for one in scores])).sum() if half else 0.0
        ratings.append((given - half * alone) / len(text.encode()))
    return int(np.argmax(ratings))
