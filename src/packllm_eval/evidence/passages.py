"""Other ways to use passages: each in a prompt of its own, mixed (REPLUG with members), and all passages against none
(context-aware contrast). The likelihood of gold answers, and greedy answers."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packllm.chat.messages import check, with_context
from packllm.engines.member import Member
from packllm.weights.adaptive import Adaptive
from packllm_eval.evidence import prompts, reading
from packllm_eval.evidence.answers import MAX_TOKENS, lines_of, number
from packllm_eval.evidence.methods import dropped, em, nll
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
TWO, CONTRAST = "the two likeliest passages in one prompt", f"contrast, a = {WRITTEN:g}"
SHARP, ALIKE = "mixture of passages, by the question, τ = 1", "mixture of passages, alike"

SETS = {"rag": (ONE, LIKELIEST, SHARP, CONTRAST), "joined": (ONE, LIKELIEST, SHARP, ALIKE, TWO)}
"""The questions, and pairs of them in one message; the ways in which answers to them are written, all with adapt."""

COSTS = (("seconds", 1), ("read", 0), ("running", 1))
"""Fields of an answer, with the decimals that they are shown with."""

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


class Question:
    """A row whose prompts are read by all members, each once, when they are asked for."""

    def __init__(self, models: Sequence[Alone], row: Row) -> None:
        self.row, self._models = row, models
        self.text, self.passages = apart(row.prompt[0]["content"])
        self._answer = models[0].member.encoder.continuation(row.texts[0])
        self._reads: dict[tuple[str, ...], Read] = {}

    def after(self, *passages: str) -> Read:
        if passages not in self._reads:
            self._read(*passages)
        return self._reads[passages]

    def _read(self, *passages: str) -> Tensor:
        prompt = check([{"role": "user", "content": with_context(self.text, passages)}], False)
        encoded = self._models[0].member.encoder.encode(prompt)
        self._reads[passages], logprobs = prompts.read(self._models, encoded, self._answer)
        return logprobs

    @property
    def everything(self) -> Read:
        return self.after(*self.passages)

    @property
    def each(self) -> list[Read]:
        return [self.after(passage) for passage in self.passages]

    def chosen(self, rated: np.ndarray) -> list[str]:
        """The passage after which the question is likeliest; two if it needs two."""
        best = np.argsort(rated)[-2 if self.row.set == "joined" else -1 :]
        return [self.passages[at] for at in sorted(best)]

    def arrays(self) -> Arrays:
        """What ways() takes."""
        found = self.singles() | self.contrasts(self.passages)
        found |= {"long": self.everything.gold, "weights": self.everything.weights, "none": self.after().gold}
        chosen = self.chosen(relevances(found))
        found |= {f"chosen_{name}": array for name, array in self.contrasts(chosen, adapt=True).items()}
        if self.row.set == "joined":
            found |= {"two": self.after(*chosen).gold, "two_weights": self.after(*chosen).weights}
        return found

    def singles(self) -> Arrays:
        golds = self.row.texts[1:] or self.row.texts
        found = {"right": np.array([any(_right(gold, passage) for gold in golds) for passage in self.passages])}
        for at, one in enumerate(self.each):
            found |= {f"prompt{at}": one.scored, f"answer{at}": one.gold}
            found[f"spans{at}"] = np.array([one.encoded.starts, one.encoded.ends]).T
            found[f"question{at}"] = np.array(one.encoded.text.rfind(self.text))
        return found

    def contrasts(self, passages: Sequence[str], adapt: bool = False) -> Arrays:
        """For each a, log-probabilities of the gold answer's tokens, and which of them are the likeliest: (a, n). And
        the log-probabilities under p(with passages)^(1 + a): what of a gain is mere sharpening."""
        both = torch.stack([self._read(*passages), self._read()], 2)
        read = self.after(*passages)
        state, weights = Adaptive(read.weights), []
        for given in np.exp(read.gold).T:
            weights.append(state.weights() if adapt else read.weights)
            state.observe(given)
        used = torch.from_numpy(np.stack(weights))[:, None]
        found = [prompts.fused(both, used, a).log_softmax(-1) for a in CONTRASTS]
        sharp = [((1 + a) * found[0]).log_softmax(-1) for a in CONTRASTS]
        return {
            "contrast": np.stack([prompts.of(one, self._answer) for one in found]),
            "sharpened": np.stack([prompts.of(one, self._answer) for one in sharp]),
            "likeliest": np.stack([one.argmax(-1).cpu().numpy() == np.array(self._answer) for one in found]),
        }


@dataclass(frozen=True)
class Way:
    """The prompts that an answer follows, their weights (P, K), what else was read to choose them, and a."""

    after: list[Read]
    weights: np.ndarray
    chosen_by: Sequence[Read] = ()
    contrast: float | None = None


def way(label: str, question: Question, arrays: Arrays) -> Way:
    rated, each = relevances(arrays), question.each
    if label == ONE:
        return Way([question.everything], question.everything.weights[None])
    if label == CONTRAST:
        return Way([question.everything, question.after()], question.everything.weights[None], contrast=WRITTEN)
    if label in (LIKELIEST, TWO):
        chosen = each[int(rated.argmax())] if label == LIKELIEST else question.after(*question.chosen(rated))
        return Way([chosen], chosen.weights[None], each)
    return Way(each, shares(rated)[label][:, None] * np.stack([one.weights for one in each]))


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
    """Write passages-<question>.npz, and append to passages.jsonl {"id", "method", "text", "tokens", "running", "read",
    "seconds"} per line, of every question of which something is missing.

    Args:
        batch: questions answered together.
        name: one of SETS.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "passages.jsonl"
    existing = {(one["id"], one["method"]) for one in lines_of(path)}

    def unwritten(row: Row) -> list[str]:
        return [label for label in SETS[name] if (row.id, f"{label} + adapt") not in existing]

    missing = [r for r in questions(data, limit, count, name) if unwritten(r) or not _path(out, r).exists()]
    models = [Alone(member, device) for member in members] if missing else []
    for start in range(0, len(missing), batch):
        group = [Question(models, row) for row in missing[start : start + batch]]
        arrays = []
        for question in group:
            started = time.perf_counter()
            arrays.append(question.arrays())
            reading.save(_path(out, question.row), arrays[-1])
            told(f"{question.row.id}: {time.perf_counter() - started:.1f} s")
        for label in SETS[name]:
            pairs = [(q, found) for q, found in zip(group, arrays, strict=True) if label in unwritten(q.row)]
            with open(path, "a", encoding="utf-8") as file:
                for line in answers(models, label, pairs) if pairs else ():
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _path(out: Path, row: Row) -> Path:
    return out / f"passages-{row.id}.npz"


def answers(models: Sequence[Alone], label: str, group: Sequence[tuple[Question, Arrays]]) -> Iterator[dict]:
    """Lines of passages.jsonl: the answers to questions of one set, written together in one way."""
    tokenizer, device = models[0].member.tokenizer, models[0].device
    used = [way(label, *one) for one in group]
    started = prompts.clock(device)
    limit = MAX_TOKENS * max(1, len(group[0][0].row.texts) - 1)
    weights = np.stack([one.weights for one in used])
    found = prompts.greedy(models, [one.after for one in used], weights, limit, used[0].contrast)
    seconds = (prompts.clock(device) - started) / len(group)
    told(f"{label}: {len(group)} answers, {seconds:.1f} s each")
    for (question, _), one, ids in zip(group, used, found, strict=True):
        reads = {id(read): read for read in [*one.chosen_by, *one.after]}.values()
        line: dict[str, Any] = {"id": question.row.id, "method": f"{label} + adapt"}
        line |= {"text": tokenizer.decode(ids, skip_special_tokens=True), "tokens": len(ids)}
        line["running"] = int((one.weights > 0).sum()) * (1 if one.contrast is None else 2)
        line["read"] = len(models) * sum(len(read.encoded.ids) for read in reads)
        yield line | {"seconds": seconds + sum(read.seconds for read in reads)}


def tables(data: Path, out: Path, limit: int | None) -> list[str]:
    """NLL of the gold answers and greedy answers in each way, of the questions that there are arrays for."""
    headings = ("## Passages one by one, and contrast", "### Questions that need two passages")
    parts = []
    for name, heading in zip(SETS, headings, strict=True):
        rows = [row for row in questions(data, limit, None, name) if _path(out, row).exists()]
        if rows:
            parts += [f"{heading}\n\n{_likelihoods(rows, out)}", *_written(rows, out)]
    return parts


def _likelihoods(rows: Sequence[Row], out: Path) -> str:
    nats: dict[str, dict[str, float]] = {}
    hits, sizes, all_right = [], {}, []
    for row in rows:
        with np.load(_path(out, row)) as file:
            arrays = dict(file)
        for label, value in ways(arrays).items():
            nats.setdefault(label, {})[row.id] = value
        sizes[row.id] = arrays["answer0"].shape[1]
        if "likeliest" in arrays:
            hits.append((arrays["likeliest"].sum(1), sizes[row.id]))
        right = arrays["right"]
        all_right.append(bool(right[np.argsort(relevances(arrays))[-max(1, right.sum()) :]].all()))
    share = np.array([hit for hit, _ in hits]).sum(0) / sum(size for _, size in hits)
    likeliest = ", ".join(f"a = {a:g}: {value:.4f}" for a, value in zip(CONTRASTS, share, strict=True))
    against = [ONE, *(f"{label} + adapt" for label in (ONE, LIKELIEST, TWO) if label in nats)]
    gains = []
    for label, by_id in nats.items():
        if "contrast" in label and (control := nats.get(label.replace("contrast", "sharpened"))):
            gains.append(f"{label}: {_versus(by_id, control, sizes)}")
    return (
        f"The passages after which the question is likeliest are the right ones in {np.mean(all_right):.1%} of "
        f"{len(rows)} questions. Share of answer tokens that are the likeliest, by contrast: {likeliest}.\n\n"
        + (f"Contrast against as much sharpening, p(with passages)^(1 + a): {'; '.join(gains)}.\n\n" if gains else "")
        + table(*_compared("nats/token", rows, nats, against, sizes))
    )


def _compared(
    unit: str, rows: Sequence[Row], values: dict[str, dict[str, float]], bases: Sequence[str], sizes: dict[str, int]
) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a table: Σ values / Σ sizes of each way by domain and over all, the lowest first, and
    against other ways on the same questions."""
    corpora = {corpus: {row.id for row in rows if row.corpus == corpus} for corpus in sorted({r.corpus for r in rows})}
    everywhere = {row.id for row in rows}
    lines: list[tuple[float, list[str]]] = []
    for label, own in values.items():
        means = []
        for places in (*corpora.values(), everywhere):
            ids = [i for i in own if i in places]
            means.append(sum(own[i] for i in ids) / sum(sizes[i] for i in ids) if ids else np.nan)
        cells = [f"{mean:.4f}" for mean in means]
        cells += [_versus(own, values[base], sizes) for base in bases]
        lines.append((means[-1], [label, str(len(own)), *cells]))
    headings = ["way", "questions", *corpora, unit, *(f"against {base}" for base in bases)]
    return headings, [line for _, line in sorted(lines, key=lambda item: item[0])]


def _versus(own: dict[str, float], base: dict[str, float], sizes: dict[str, int]) -> str:
    ids = [i for i in own if i in base]
    if not ids:
        return "–"
    first, second, size = (np.array([float(values[i]) for i in ids]) for values in (own, base, sizes))
    return versus(first, second, size)


def _written(rows: Sequence[Row], out: Path) -> Iterator[str]:
    """The table of greedy answers. Those of the one prompt may also be among the answers of all methods."""
    golds = {row.id: row.texts for row in rows}
    one, chosen = f"{ONE} + adapt", f"{LIKELIEST} + adapt"
    by: dict[str, dict[str, dict]] = {one: {}, chosen: {}}
    for line in lines_of(out / "passages.jsonl"):
        if line["id"] in golds:
            by.setdefault(line["method"], {})[line["id"]] = line
    side_by_side = set.intersection(*(set(lines) for lines in by.values()))
    for line in lines_of(out / "answers.jsonl"):
        if line["method"] == "em + adapt" and line["id"] in by[chosen]:
            by[one].setdefault(line["id"], line)
    if not all(by.values()):
        return
    f1s = {label: {i: f1(x["text"], golds[i][0]) for i, x in lines.items()} for label, lines in by.items()}
    headings, cells = _compared("F1", rows, f1s, [one, chosen], dict.fromkeys(golds, 1))
    for row in cells:
        lines = by[row[0]]
        held = proportion([all(holds(x["text"], gold) for gold in golds[i][1:] or golds[i]) for i, x in lines.items()])
        timed = [lines[i] for i in side_by_side]
        row += [f"{held.value:.3f} [{held.low:.3f}, {held.high:.3f}]"]
        row += [f"{np.mean([repeated(x['text']) for x in lines.values()]):.4f}"]
        row += [f"{np.mean([x[key] for x in timed]):.{places}f}" if timed else "–" for key, places in COSTS]
    headings += ["holds the gold answer", "repeated 3-grams", "s", "tokens read", "lines a token"]
    yield (
        f"Greedy answers; seconds of one thread, tokens read and lines run a token on {len(side_by_side)} questions "
        f"that were answered in all ways side by side:\n\n{table(headings, cells[::-1])}"
    )


def relevances(arrays: Arrays) -> np.ndarray:
    """log p of the question after each passage, under the `em` of its prompt."""
    found = []
    for at in range(len(arrays["right"])):
        prompt = arrays[f"prompt{at}"]
        asked = arrays[f"spans{at}"][:, 0] >= int(arrays[f"question{at}"])
        found.append(np.log(dropped(em(prompt)) @ np.exp(prompt[:, asked])).sum())
    return np.array(found)


def shares(rated: np.ndarray) -> dict[str, np.ndarray]:
    """The weights (P,) of passages in each mixture, from the question's likelihood after each."""
    found = {ALIKE: np.full(len(rated), 1 / len(rated))}
    for temperature in TEMPERATURES:
        share = np.exp((rated - rated.max()) / temperature)
        found[f"mixture of passages, by the question, τ = {temperature:g}"] = share / share.sum()
    return found


def ways(arrays: Arrays) -> dict[str, float]:
    """Nats of the gold answer in each way that there are arrays for."""
    count, weights = len(arrays["right"]), arrays["weights"]
    rated, own = relevances(arrays), [dropped(em(arrays[f"prompt{at}"])) for at in range(count)]
    after = [arrays[f"answer{at}"] for at in range(count)]
    best, right = int(rated.argmax()), np.flatnonzero(arrays["right"])
    mixed = {
        label: (np.concatenate([s * w for s, w in zip(share, own, strict=True)]), np.concatenate(after))
        for label, share in shares(rated).items()
    }
    mixed |= {ONE: (weights, arrays["long"]), LIKELIEST: (own[best], after[best])}
    if "two" in arrays:
        mixed[TWO] = arrays["two_weights"], arrays["two"]
    found = {label: _nats(*one) for label, one in mixed.items()}
    found |= {f"{label} + adapt": _nats(*one, adapt=True) for label, one in mixed.items()}
    found["the right passage alone (in hindsight)"] = min(
        _nats(own[at], after[at]) for at in (right if len(right) else [best])
    )
    if "none" in arrays:
        found["no passage"] = _nats(weights, arrays["none"])
    chosen = TWO if "two" in arrays else LIKELIEST
    for start, prefix, adapted in (("", "", ""), (f"{chosen}, ", "chosen_", " + adapt")):
        for kind in ("contrast", "sharpened"):
            for a, logprobs in zip(CONTRASTS, arrays.get(prefix + kind, ()), strict=False):
                if a:
                    found[f"{start}{kind}, a = {a:g}{adapted}"] = -logprobs.sum()
    return found


def _nats(weights: np.ndarray, logprobs: np.ndarray, adapt: bool = False) -> float:
    return float(nll(weights[None], [logprobs], adapt)[0])
