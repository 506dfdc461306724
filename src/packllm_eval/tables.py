"""Tables from records: a row per method, with intervals and paired tests against the best member."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from packllm_eval.choice import right
from packllm_eval.lm import bits_per_byte
from packllm_eval.statistics import Interval, Paired, interval, paired, proportion

Records = Sequence[dict[str, Any]]

AVERAGE = "average over corpora"
"""Name of the pseudo-corpus with the mean over corpora."""


@dataclass(frozen=True)
class Entry:
    """One method on one corpus.

    Attributes:
        corpus: its name, or AVERAGE.
        method: its label; "member NAME" for a member alone; "best member" for the one that is best on the corpus
            in hindsight, "largest member" for the one with the largest weights in bytes.
        rows: number of documents or questions.
        score: bits per byte (lower is better), or accuracy.
        more: a second figure: perplexity per token, or byte-normalised accuracy.
        against: the difference from the best single member, or from the given base, on the same rows; None for
            that method itself.
        weights: mean weight of each member.
    """

    corpus: str
    method: str
    rows: int
    score: Interval
    more: float | None
    against: Paired | None
    weights: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "corpus": self.corpus,
            "method": self.method,
            "rows": self.rows,
            **self.score.as_dict(),
            "more": self.more,
            "against": self.against.as_dict() if self.against else None,
            "weights": self.weights,
        }


def scored(records: Records) -> list[dict[str, Any]]:
    """The records that were not left out."""
    return [record for record in records if "left_out" not in record]


def corpora(records: Records) -> dict[str, list[dict[str, Any]]]:
    """Scored records by corpus."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in scored(records):
        groups.setdefault(record["corpus"], []).append(record)
    return groups


def lm_table(
    records: Records, prompt: str | None = None, base: str | None = None, best_of: Sequence[str] | None = None
) -> list[Entry]:
    """Bits per byte after one of the prompt lengths (None: the first), by corpus and on average over corpora.

    Args:
        records: of lm.evaluate.
        prompt: a prompt length.
        base: label of the method that all are compared with; None: the best single member in hindsight.
        best_of: names of the members that "best member" is chosen from; None: all.
    """
    entries = []
    groups = corpora(records)
    for corpus, rows in groups.items():
        length = prompt or next(iter(rows[0]["prompts"]))
        columns = _lm_columns(rows, length)
        sizes = [row["bytes"] for row in rows]
        candidates = [f"member {name}" for name in best_of or rows[0]["members"]]
        best = min(candidates, key=lambda m: sum(columns[m]))
        for label, nats in columns.items():
            bits = [n / math.log(2) for n in nats]
            other = [n / math.log(2) for n in columns[base or best]]
            tokens = sum(row["tokens"] or 0 for row in rows)
            entries.append(
                Entry(
                    corpus,
                    label,
                    len(rows),
                    interval(bits, sizes),
                    math.exp(sum(nats) / tokens) if tokens else None,
                    None if label == (base or best) else paired(bits, other, sizes),
                    _mean_weights([row["prompts"][length]["methods"][label]["weights"] for row in rows])
                    if label in rows[0]["prompts"][length]["methods"]
                    else {},
                )
            )
        entries += _references(entries, rows, best)
    return [*entries, *(_averages(entries, geometric) if len(groups) > 1 else [])]


def _lm_columns(rows: Records, length: str) -> dict[str, list[float]]:
    columns = {f"member {name}": [row["members"][name] for row in rows] for name in rows[0]["members"]}
    for label in rows[0]["prompts"][length]["methods"]:
        columns[label] = [row["prompts"][length]["methods"][label]["nats"] for row in rows]
    return columns


def choice_table(records: Records, base: str | None = None, best_of: Sequence[str] | None = None) -> list[Entry]:
    """Accuracy by task and on average over tasks; `more` is byte-normalised accuracy. Otherwise as lm_table."""

    def columns(rows: Records) -> dict[str, _Column]:
        nats = {f"member {name}": [row["members"][name] for row in rows] for name in rows[0]["members"]}
        nats |= {m: [row["methods"][m]["nats"] for row in rows] for m in rows[0]["methods"]}
        found = {}
        for label, cells in nats.items():
            hits = [right(row, cell) for row, cell in zip(rows, cells, strict=True)]
            per_byte = [right(row, cell, per_byte=True) for row, cell in zip(rows, cells, strict=True)]
            methods = [row["methods"][label] for row in rows] if label in rows[0]["methods"] else []
            found[label] = _Column(hits, sum(per_byte) / len(rows), _mean_weights([m["weights"] for m in methods]))
        return found

    return _shares(records, columns, base, best_of)


def generate_table(records: Records, base: str | None = None, best_of: Sequence[str] | None = None) -> list[Entry]:
    """Exact match by task and on average over tasks; `more` is seconds per answer. Otherwise as lm_table."""

    def columns(rows: Records) -> dict[str, _Column]:
        found = {}
        for label in rows[0]["methods"]:
            cells = [row["methods"][label] for row in rows]
            seconds = sum(cell["seconds"] for cell in cells) / len(cells)
            weights = _mean_weights([cell["weights"] for cell in cells])
            found[label] = _Column([cell["right"] for cell in cells], seconds, weights)
        return found

    return _shares(records, columns, base, best_of)


class _Column(NamedTuple):
    """A method's hits on a task, a second figure, and mean weights."""

    hits: list[bool]
    more: float
    weights: dict[str, float]


def _shares(
    records: Records,
    columns: Callable[[Records], dict[str, _Column]],
    base: str | None,
    best_of: Sequence[str] | None,
) -> list[Entry]:
    """Entries whose score is the share of right rows."""
    entries = []
    groups = corpora(records)
    for corpus, rows in groups.items():
        by_method = columns(rows)
        best = max((f"member {name}" for name in best_of or _alone(by_method)), key=lambda m: sum(by_method[m].hits))
        other = base or best
        for label, (hits, more, weights) in by_method.items():
            against = None if label == other else paired(hits, by_method[other].hits)
            entries.append(Entry(corpus, label, len(rows), proportion(hits), more, against, weights))
        entries += _references(entries, rows, best)
    return [*entries, *(_averages(entries, arithmetic) if len(groups) > 1 else [])]


def _alone(labels: Iterable[str]) -> list[str]:
    return [label.removeprefix("member ") for label in labels if label.startswith("member ")]


def _references(entries: Sequence[Entry], rows: Records, best: str) -> list[Entry]:
    """The entries of the best and of the largest member again, under these names."""
    corpus = rows[0]["corpus"]
    by_method = {entry.method: entry for entry in entries if entry.corpus == corpus}
    reference_of = {"best member": best}
    if "largest" in rows[0]:
        reference_of["largest member"] = f"member {rows[0]['largest']}"
    return [replace(by_method[label], method=name, weights={}) for name, label in reference_of.items()]


def arithmetic(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def geometric(values: Sequence[float]) -> float:
    """The mean of perplexities: the exponential of the mean NLL."""
    return math.exp(arithmetic([math.log(value) for value in values]))


def _averages(entries: Sequence[Entry], mean_of_more: Callable[[Sequence[float]], float]) -> list[Entry]:
    """Means over corpora, with equal weight, of the methods that all corpora have. Corpora are taken as independent, so
    half-widths are combined as squares."""
    averages = []
    count = len({entry.corpus for entry in entries})
    for label in dict.fromkeys(entry.method for entry in entries):
        parts = [entry for entry in entries if entry.method == label]
        if len(parts) < count:
            continue
        more = [entry.more for entry in parts if entry.more is not None]
        deltas = [entry.against.difference for entry in parts if entry.against is not None]
        # Where a method is compared with itself, the difference is exactly 0.
        deltas += [Interval(0.0, 0.0, 0.0)] * (len(parts) - len(deltas))
        difference = _mean(deltas)
        spread = (difference.high - difference.low) / (2 * 1.96)
        p = math.erfc(abs(difference.value) / spread / math.sqrt(2)) if spread else 1.0
        averages.append(
            Entry(
                AVERAGE,
                label,
                sum(entry.rows for entry in parts),
                _mean([entry.score for entry in parts]),
                mean_of_more(more) if len(more) == len(parts) else None,
                Paired(difference, p) if any(entry.against for entry in parts) else None,
                _mean_weights([entry.weights for entry in parts]),
            )
        )
    return averages


def _mean(intervals: Sequence[Interval]) -> Interval:
    count = len(intervals)
    value = sum(i.value for i in intervals) / count
    half: Callable[[Iterable[float]], float] = lambda sides: math.sqrt(sum(s * s for s in sides)) / count  # noqa: E731
    return Interval(
        value, value - half(i.value - i.low for i in intervals), value + half(i.high - i.value for i in intervals)
    )


def _mean_weights(weights: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in weights for name in each)
    return {name: sum(each.get(name, 0.0) for each in weights) / len(weights) for name in names}


def costs(records: Records) -> dict[str, float]:
    """The time of each method's weighting in passes of one member over a document: mean over rows and prompts."""
    values_of: dict[str, list[float]] = {}
    for record in scored(records):
        one = sum(record["seconds"].values()) / len(record["seconds"])
        for prompt in record["prompts"].values():
            for label, method in prompt["methods"].items():
                values_of.setdefault(label, []).append(method["seconds"] / one)
    return {label: sum(values) / len(values) for label, values in values_of.items()}


@dataclass(frozen=True)
class Use:
    """A member's role in a pack on a corpus: a row of the audit.

    Attributes:
        rows: number of documents.
        weight: its mean weight.
        runs: share of documents where it has weight, so that it runs while decoding.
        top: share of documents where it has the largest weight.
        alone: bits per byte of the member alone.
        helps: bits per byte that the pack loses without it (negative: the pack is better without it).
        cost: seconds of its pass over a document.
    """

    corpus: str
    member: str
    rows: int
    weight: float
    runs: float
    top: float
    alone: float
    helps: Interval
    cost: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**self.__dict__, "helps": self.helps.as_dict()}


def uses(records: Records, label: str) -> list[Use]:
    """The audit of a method and its variants "LABEL without NAME", one row per member and corpus."""
    rows_ = []
    for corpus, rows in corpora(records).items():
        length = next(iter(rows[0]["prompts"]))
        methods = [row["prompts"][length]["methods"] for row in rows]
        sizes = [row["bytes"] for row in rows]
        for name in rows[0]["members"]:
            weights = [m[label]["weights"][name] for m in methods]
            top = [max(m[label]["weights"], key=m[label]["weights"].__getitem__) == name for m in methods]
            without = f"{label} without {name}"
            losses = [(m[without]["nats"] - m[label]["nats"]) / math.log(2) if without in m else 0.0 for m in methods]
            alone = bits_per_byte(sum(row["members"][name] for row in rows), sum(sizes))
            rows_.append(
                Use(
                    corpus,
                    name,
                    len(rows),
                    sum(weights) / len(rows),
                    sum(w != 0 for w in weights) / len(rows),
                    sum(top) / len(rows),
                    alone,
                    interval(losses, sizes),
                    sum(row["seconds"][name] for row in rows) / len(rows),
                )
            )
    return rows_
