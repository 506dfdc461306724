"""Other ways to use passages: each in a prompt of its own, mixed (REPLUG with members), and all passages against none
(context-aware contrast). The likelihood of gold answers, and greedy answers."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from packllm.chat.messages import check, with_context
from packllm.engines.member import Member
from packllm.weights.adaptive import Adaptive
from packllm_eval.evidence import prompts, reading
from packllm_eval.evidence.answers import MAX_TOKENS, lines_of, number
from packllm_eval.evidence.methods import dropped, em
from packllm_eval.evidence.prompts import Read
from packllm_eval.evidence.reading import Alone, Row, told
from packllm_eval.evidence.show import table, versus
from packllm_eval.evidence.texts import f1, holds, repeated
from packllm_eval.statistics import proportion

CONTRASTS = (0.0, 0.1, 0.25, 0.5, 1.0)
"""a in p ∝ p(with passages)^(1 + a) / p(without)^a."""

WRITTEN = 0.25
"""The a that answers are written with."""

TEMPERATURES = (1.0, 4.0)
"""Nats of a question's likelihood after its passages that make their weights differ by a factor of e."""

ONE, LIKELIEST = "one prompt, em", "the likeliest passage alone"
TWO, MIXTURE = "the two likeliest passages in one prompt", "mixture of passages"

SETS = ("rag", "joined")
"""The questions, and pairs of them in one message."""

Arrays = dict[str, np.ndarray]


def questions(data: Path, limit: int | None, count: int | None, name: str = "rag") -> list[Row]:
    """The first `count` test questions of each corpus; of the set "joined", those made of them."""
    rows = [row for row in reading.rows_of(data, limit) if row.set == "rag" and row.use == "test"]
    rows.sort(key=lambda row: (number(row), row.corpus))
    rows = rows if name == "rag" else joined(rows)
    return [row for row in rows if count is None or number(row) < count]


def apart(content: str) -> tuple[str, list[str]]:
    """The question and the passages that with_context() put together."""
    head, middle = with_context("\0", ["\1"]).replace("\0", "\1").split("\1")[:2]
    context, _, question = content.removeprefix(head).rpartition(middle)
    return question, context.split("\n\n")


def joined(rows: Sequence[Row]) -> list[Row]:
    """Questions whose answer is in two passages: two questions of a corpus in one message, with the right passage of
    each and one wrong one. Pairs without two different right passages are left out."""
    found = []
    for corpus in dict.fromkeys(row.corpus for row in rows):
        of_corpus = [row for row in rows if row.corpus == corpus]
        for at, pair in enumerate(zip(of_corpus[::2], of_corpus[1::2], strict=False)):
            asked, shown = zip(*(apart(row.prompt[0]["content"]) for row in pair), strict=True)
            golds = [row.texts[0] for row in pair]
            right = {p for gold, passages in zip(golds, shown, strict=True) for p in passages if _right(gold, p)}
            passages = sorted([*right, *[p for p in shown[0] if p not in right][:1]])
            random.Random(f"joined {corpus} {at}").shuffle(passages)
            prompt = [{"role": "user", "content": with_context(" Also: ".join(asked), passages)}]
            if len(right) == 2:
                found.append(Row(f"joined-{corpus}-{at}", "joined", corpus, "test", prompt, [" ".join(golds), *golds]))
    return sorted(found, key=lambda row: (number(row), row.corpus))


def _right(gold: str, passage: str) -> bool:
    return gold[:60] in passage


@dataclass(frozen=True)
class Reads:
    """What all members read of a question: all its passages, none, each; and the likeliest two if it needs two."""

    everything: Read
    nothing: Read
    each: list[Read]
    two: Read | None


def read(
    members: Sequence[Member],
    data: Path,
    out: Path,
    device: str,
    limit: int | None,
    count: int | None,
    batch: int,
    name: str = "rag",
) -> None:
    """Write passages-<question>.npz, and append to passages.jsonl the answers, of every question that has none yet.

    Args:
        batch: questions answered together.
        name: one of SETS.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "passages.jsonl"
    existing = {one["id"] for one in lines_of(path)}
    missing = [
        row for row in questions(data, limit, count, name) if row.id not in existing or not _path(out, row).exists()
    ]
    models = [Alone(member, device) for member in members] if missing else []
    for start in range(0, len(missing), batch):
        group: list[tuple[Row, Reads, Arrays]] = []
        for row in missing[start : start + batch]:
            started = time.perf_counter()
            group.append((row, *_reads(models, row)))
            reading.save(_path(out, row), group[-1][-1])
            told(f"{row.id}: {time.perf_counter() - started:.1f} s")
        unanswered = [one for one in group if one[0].id not in existing]
        written = list(_answers(models, unanswered)) if unanswered else []
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in written)


def _path(out: Path, row: Row) -> Path:
    return out / f"passages-{row.id}.npz"


def _reads(models: Sequence[Alone], row: Row) -> tuple[Reads, Arrays]:
    encoder = models[0].member.encoder
    question, passages = apart(row.prompt[0]["content"])
    answer = encoder.continuation(row.texts[0])

    def after(*shown: str) -> tuple[Read, Tensor]:
        encoded = encoder.encode(check([{"role": "user", "content": with_context(question, shown)}], False))
        return prompts.read(models, encoded, answer)

    (everything, with_), (nothing, without) = after(*passages), after()
    each = [after(passage)[0] for passage in passages]
    weights = torch.from_numpy(everything.weights[None, None]).expand(len(answer), -1, -1)
    both = torch.stack([with_, without], 2)
    contrasts = [prompts.fused(both, weights, a).log_softmax(-1) for a in CONTRASTS]
    arrays = {"long": everything.gold, "none": nothing.gold, "weights": everything.weights}
    for at, one in enumerate(each):
        arrays |= {f"prompt{at}": one.scored, f"answer{at}": one.gold}
        arrays[f"spans{at}"] = np.array([one.encoded.starts, one.encoded.ends]).T
        arrays[f"question{at}"] = np.array(one.encoded.text.rfind(question))
    arrays["contrast"] = np.stack([prompts.of(one, answer) for one in contrasts])
    arrays["likeliest"] = np.stack([one.argmax(-1).cpu().numpy() == np.array(answer) for one in contrasts])
    parts = row.texts[1:] or row.texts
    arrays["right"] = np.array([any(_right(gold, passage) for gold in parts) for passage in passages])
    if len(parts) == 1:
        return Reads(everything, nothing, each, None), arrays
    first, second = sorted(np.argsort(relevances(arrays))[-2:])
    two, _ = after(passages[first], passages[second])
    return Reads(everything, nothing, each, two), arrays | {"two": two.gold, "two_weights": two.weights}


def _answers(models: Sequence[Alone], group: Sequence[tuple[Row, Reads, Arrays]]) -> Iterator[dict]:
    """Lines of passages.jsonl: each way's answers to a group of questions of one set."""
    tokenizer, device = models[0].member.tokenizer, models[0].device
    ways = [_written(reads, arrays) for _, reads, arrays in group]
    limit = MAX_TOKENS * max(1, len(group[0][0].texts) - 1)
    for label, (_, _, _, contrast) in ways[0].items():
        inputs = [one[label] for one in ways]
        started = prompts.clock(device)
        weights = np.stack([weights for _, _, weights, _ in inputs])
        answers = prompts.greedy(models, [after for _, after, _, _ in inputs], weights, limit, contrast)
        seconds = (prompts.clock(device) - started) / len(group)
        told(f"{label}: {len(group)} answers, {seconds:.1f} s each")
        for (row, _, _), (chosen_by, after, used, _), ids in zip(group, inputs, answers, strict=True):
            readers = {id(one): one for one in [*chosen_by, *after]}.values()
            running = int((used > 0).sum()) * (1 if contrast is None else 2)
            line = {"id": row.id, "method": label, "text": tokenizer.decode(ids, skip_special_tokens=True)}
            line |= {
                "tokens": len(ids),
                "running": running,
                "read": len(models) * sum(len(one.encoded.ids) for one in readers),
            }
            yield line | {"seconds": seconds + sum(one.seconds for one in readers)}


def _written(reads: Reads, arrays: Arrays) -> dict[str, tuple[list[Read], list[Read], np.ndarray, float | None]]:
    """By way: the prompts that choose or weigh passages, those that the answer follows, their weights (P, K), and a."""
    rated, own = relevances(arrays), np.stack([one.weights for one in reads.each])
    best, whole = int(rated.argmax()), reads.everything.weights[None]
    mixed = {label: share[:, None] * own for label, share in shares(rated).items()}
    sharp, alike = f"{MIXTURE}, by the question, τ = 1", f"{MIXTURE}, alike"
    found: dict[str, tuple[list[Read], list[Read], np.ndarray, float | None]] = {
        ONE: ([], [reads.everything], whole, None),
        LIKELIEST: (reads.each, [reads.each[best]], own[best][None], None),
        sharp: ([], reads.each, mixed[sharp], None),
    }
    if reads.two is None:
        found[f"contrast, a = {WRITTEN:g}"] = ([], [reads.everything, reads.nothing], whole, WRITTEN)
    else:
        found[alike] = ([], reads.each, mixed[alike], None)
        found[TWO] = (reads.each, [reads.two], reads.two.weights[None], None)
    return {f"{label} + adapt": way for label, way in found.items()}


def tables(data: Path, out: Path, limit: int | None) -> list[str]:
    """NLL of the gold answers and greedy answers under each way, of the questions that there are arrays for."""
    headings = ("## Passages one by one, and contrast", "### Questions that need two passages")
    parts = []
    for name, heading in zip(SETS, headings, strict=True):
        rows = [row for row in questions(data, limit, None, name) if _path(out, row).exists()]
        if rows:
            parts += [f"{heading}\n\n{_likelihoods(rows, out)}", *_written_table(rows, out)]
    return parts


def _likelihoods(rows: Sequence[Row], out: Path) -> str:
    nats: dict[str, list[float]] = {}
    hits, sizes, found_right = [], [], []
    for row in rows:
        with np.load(_path(out, row)) as file:
            arrays = dict(file)
        for label, value in ways(arrays).items():
            nats.setdefault(label, []).append(value)
        hits.append(arrays["likeliest"].sum(1))
        sizes.append(arrays["long"].shape[1])
        right = arrays["right"]
        found_right.append(bool(right[np.argsort(relevances(arrays))[-max(1, right.sum()) :]].all()))
    counted, found = np.array(sizes), {label: np.array(values) for label, values in nats.items()}
    places = _places(rows)
    bases = [found[label] for label in (ONE, f"{ONE} + adapt", f"{LIKELIEST} + adapt")]
    lines: list[list[str]] = []
    for label, values in sorted(found.items(), key=lambda item: item[1].sum()):
        cells = [f"{values[at].sum() / counted[at].sum():.4f}" for at in places.values()]
        total = f"{values.sum() / counted.sum():.4f}"
        lines.append([label, *cells, total, *(versus(values, base, counted) for base in bases)])
    counts = ", ".join(f"{corpus} {len(at)}" for corpus, at in places.items())
    share = np.array(hits).sum(0) / counted.sum()
    likeliest = ", ".join(f"a = {a:g}: {value:.4f}" for a, value in zip(CONTRASTS, share, strict=True))
    against = [f"against {label}" for label in ("one prompt, em", "the same + adapt", f"{LIKELIEST} + adapt")]
    return (
        f"{len(sizes)} questions: {counts}. The passages after which the question is likeliest are the right ones in "
        f"{np.mean(found_right):.1%}. Share of answer tokens that are the likeliest, by contrast: {likeliest}.\n\n"
        + table(["way", *places, "nats/token", *against], lines)
    )


def _places(rows: Sequence[Row]) -> dict[str, list[int]]:
    corpora = sorted({row.corpus for row in rows})
    return {corpus: [at for at, row in enumerate(rows) if row.corpus == corpus] for corpus in corpora}


def _written_table(rows: Sequence[Row], out: Path) -> Iterator[str]:
    """The greedy answers of all questions that have them under every way."""
    by: dict[str, dict[str, dict]] = {row.id: {} for row in rows}
    for line in lines_of(out / "passages.jsonl"):
        by.get(line["id"], {})[line["method"]] = line
    answered = [row for row in rows if by[row.id]]
    if not answered:
        return
    places = _places(answered)
    by_way = {label: [by[row.id][label] for row in answered] for label in by[answered[0].id]}
    f1s = {
        label: np.array([f1(line["text"], row.texts[0]) for row, line in zip(answered, lines, strict=True)])
        for label, lines in by_way.items()
    }
    bases = [f1s[f"{label} + adapt"] for label in (ONE, LIKELIEST)]
    found = []
    for label, values in sorted(f1s.items(), key=lambda item: -item[1].mean()):
        lines = by_way[label]
        contains = [
            all(holds(line["text"], gold) for gold in row.texts[1:] or row.texts)
            for row, line in zip(answered, lines, strict=True)
        ]
        share = proportion(contains)
        cells = [f"{values[at].mean():.4f}" for at in places.values()]
        gold = f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"
        repetition = f"{np.mean([repeated(line['text']) for line in lines]):.4f}"
        costs = [np.mean([line[key] for line in lines]) for key in ("seconds", "read", "running")]
        found.append([label, *cells, f"{values.mean():.4f}", *(versus(values, base) for base in bases), gold])
        found[-1] += [repetition, f"{costs[0]:.2f}", f"{costs[1]:.0f}", f"{costs[2]:.1f}"]
    headings = ["way", *places, "F1", "against one prompt", "against the likeliest passage", "holds the gold answer"]
    headings += ["repeated 3-grams", "s", "tokens read", "lines run a token"]
    yield f"Greedy answers to {len(answered)} of them:\n\n{table(headings, found)}"


def relevances(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """log p of the question after each passage, under the `em` of its prompt."""
    found = []
    for at in range(len(arrays["right"])):
        prompt = arrays[f"prompt{at}"]
        asked = arrays[f"spans{at}"][:, 0] >= int(arrays[f"question{at}"])
        found.append(np.log(dropped(em(prompt)) @ np.exp(prompt[:, asked])).sum())
    return np.array(found)


def shares(rated: np.ndarray) -> dict[str, np.ndarray]:
    """The weights (P,) of passages in each mixture, from the question's likelihood after each."""
    found = {f"{MIXTURE}, alike": np.full(len(rated), 1 / len(rated))}
    for temperature in TEMPERATURES:
        share = np.exp((rated - rated.max()) / temperature)
        found[f"{MIXTURE}, by the question, τ = {temperature:g}"] = share / share.sum()
    return found


def ways(arrays: Arrays) -> dict[str, float]:
    """Nats of the gold answer under each way."""
    count, weights = len(arrays["right"]), arrays["weights"]
    rated, own = relevances(arrays), [dropped(em(arrays[f"prompt{at}"])) for at in range(count)]
    answers = [arrays[f"answer{at}"] for at in range(count)]
    one = [_nats(w, a) for w, a in zip(own, answers, strict=True)]
    best, right = int(rated.argmax()), np.flatnonzero(arrays["right"])
    mixed = {
        label: (np.concatenate([s * w for s, w in zip(share, own, strict=True)]), np.concatenate(answers))
        for label, share in shares(rated).items()
    }
    mixed |= {ONE: (weights, arrays["long"]), LIKELIEST: (own[best], answers[best])}
    if "two" in arrays:
        mixed[TWO] = arrays["two_weights"], arrays["two"]
    found = {label: _nats(*way) for label, way in mixed.items()}
    found |= {f"{label} + adapt": _adapted(*way) for label, way in mixed.items()}
    found["no passage"] = _nats(weights, arrays["none"])
    found["the right passage alone (in hindsight)"] = min(one[at] for at in right) if len(right) else one[best]
    found |= {f"contrast, a = {a:g}": float(-c.sum()) for a, c in zip(CONTRASTS, arrays["contrast"], strict=True) if a}
    return found


def _nats(weights: np.ndarray, logprobs: np.ndarray) -> float:
    return float(-np.log(weights @ np.exp(logprobs)).sum())


def _adapted(weights: np.ndarray, logprobs: np.ndarray) -> float:
    state, nats = Adaptive(weights), 0.0
    for given in np.exp(logprobs).T:
        nats -= float(np.log(state.weights() @ given))
        state.observe(given)
    return nats
