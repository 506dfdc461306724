"""The files of a report: report.md, report.json and plots."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packllm.errors import ExtraError
from packllm_eval.tables import AVERAGE, Entry, Records, Use, lm_table, scored

log = logging.getLogger("packllm")

Headings = tuple[str, str]
"""Names of the columns `score` and `more`."""

LM: Headings = ("bits/byte", "perplexity/token")
CHOICE: Headings = ("accuracy", "accuracy, per byte")
GENERATE: Headings = ("exact match", "seconds")


def markdown(entries: Sequence[Entry], headings: Headings, lower_is_better: bool, base: str = "the best member") -> str:
    """A Markdown table per corpus: best method first, with 95 % intervals and the difference from `base`."""
    parts = []
    for corpus in dict.fromkeys(entry.corpus for entry in entries):
        rows = [entry for entry in entries if entry.corpus == corpus]
        rows.sort(key=lambda e: e.score.value if lower_is_better else -e.score.value)
        title = "Average over corpora" if corpus == AVERAGE else corpus
        parts += [
            f"### {title} ({rows[0].rows} rows)",
            "",
            f"| method | {headings[0]} | 95 % interval | {headings[1]} | against {base} | p |",
            "|---|---|---|---|---|---|",
        ]
        parts += [_row(entry) for entry in rows]
        parts.append("")
    return "\n".join(parts)


def grid(entries: Sequence[Entry]) -> str:
    """One Markdown table: a row per method, a column per corpus."""
    corpora = list(dict.fromkeys(entry.corpus for entry in entries))
    cells = {(entry.corpus, entry.method): f"{entry.score.value:.4f}" for entry in entries}
    lines = [f"| method | {' | '.join(corpora)} |", "|---" * (len(corpora) + 1) + "|"]
    for method in dict.fromkeys(entry.method for entry in entries):
        lines.append(f"| {method} | {' | '.join(cells.get((corpus, method), '') for corpus in corpora)} |")
    return "\n".join(lines) + "\n"


def _row(entry: Entry) -> str:
    against, p = "", ""
    if entry.against is not None:
        difference = entry.against.difference
        against = f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        p = f"{entry.against.p:.3f}" if entry.against.p >= 0.001 else "<0.001"
    more = "" if entry.more is None else f"{entry.more:.3f}"
    score = entry.score
    return f"| {entry.method} | {score.value:.4f} | {score.low:.4f} to {score.high:.4f} | {more} | {against} | {p} |"


LEAST = 10
"""Fewest documents for a verdict: with fewer, bootstrap intervals are far too narrow."""


def audit(uses: Sequence[Use]) -> str:
    """For each corpus which members help, which never get weight, and what each costs, in Markdown."""
    parts = []
    for corpus in dict.fromkeys(use.corpus for use in uses):
        rows = [use for use in uses if use.corpus == corpus]
        parts += [
            f"### Members on {corpus}",
            "",
            "| member | mean weight | runs on | top on | alone, bits/byte | the pack loses without it | s a document |",
            "|---|---|---|---|---|---|---|",
        ]
        parts += [
            f"| {u.member} | {u.weight:.3f} | {u.runs:.0%} | {u.top:.0%} | {u.alone:.4f} | {u.helps.value:+.4f} "
            f"[{u.helps.low:+.4f}, {u.helps.high:+.4f}] | {u.cost:.2f} |"
            for u in rows
        ]
        parts += ["", _verdict(rows), ""]
    return "\n".join(parts)


def _verdict(rows: Sequence[Use]) -> str:
    if rows[0].rows < LEAST:
        return f"Too few documents ({rows[0].rows}) to say who helps; intervals are reliable with {LEAST} or more."
    helping = [u.member for u in rows if u.helps.low > 0]
    idle = [u.member for u in rows if u.runs == 0]
    hurting = [u.member for u in rows if u.helps.high < 0]
    lines = [f"Helps: {', '.join(helping) or 'none for certain'}."]
    if idle:
        lines.append(f"Never gets weight: {', '.join(idle)}.")
    if hurting:
        lines.append(f"The pack is better without: {', '.join(hurting)}.")
    return " ".join(lines)


def left_out(records: Records) -> str:
    """A line about the rows that could not be scored; "" if there are none."""
    skipped = [record for record in records if "left_out" in record]
    return f"{len(skipped)} of {len(records)} rows left out; the first: {skipped[0]['left_out']}\n" if skipped else ""


def write(folder: Path, title: str, parts: Sequence[str], content: dict[str, Any]) -> None:
    """Write report.md and report.json to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(part.strip() for part in [f"# {title}", *parts] if part.strip())
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    dumped = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(dumped + "\n", encoding="utf-8")


def can_plot(wanted: bool | None) -> bool:
    """Whether to draw plots. `wanted` None: if matplotlib is installed; otherwise log a warning.

    Raises:
        ExtraError: plots are wanted, but matplotlib is not installed. So it is raised before the work, not after it.
    """
    missing = importlib.util.find_spec("matplotlib") is None
    if missing and wanted:
        raise ExtraError("drawing a report's plots", "matplotlib", "eval")
    if missing and wanted is None:
        log.warning("tables only: plots need matplotlib; install packllm[eval], or give --no-plots")
    return not missing and wanted is not False


def _pyplot() -> Any:
    can_plot(True)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_weights(path: Path, entries: Sequence[Entry], label: str) -> None:
    """Plot the mean weight of each member by corpus under one method, stacked."""
    pyplot = _pyplot()
    rows = [entry for entry in entries if entry.method == label and entry.corpus != AVERAGE]
    names = list(dict.fromkeys(name for entry in rows for name in entry.weights))
    figure, axes = pyplot.subplots(figsize=(7, 0.5 + 0.45 * len(rows)), layout="constrained")
    left_edges = [0.0] * len(rows)
    for name in names:
        values = [entry.weights.get(name, 0.0) for entry in rows]
        axes.barh([entry.corpus for entry in rows], values, left=left_edges, label=name)
        left_edges = [a + b for a, b in zip(left_edges, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"mean weight under {label}")
    figure.legend(loc="outside upper center", ncols=min(6, len(names)), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_scores(path: Path, entries: Sequence[Entry], heading: str, corpus: str) -> None:
    """Plot each method's score on one corpus with its 95 % interval."""
    pyplot = _pyplot()
    rows = sorted((entry for entry in entries if entry.corpus == corpus), key=lambda entry: entry.score.value)
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.28 * len(rows)), layout="constrained")
    for at, entry in enumerate(rows):
        score, own = entry.score, not entry.method.startswith(("member ", "best member", "largest member"))
        error = [[score.value - score.low], [score.high - score.value]]
        axes.errorbar(score.value, at, xerr=error, fmt="o", color="C0" if own else "C7", capsize=2, markersize=4)
    axes.set_yticks(range(len(rows)), [entry.method for entry in rows])
    axes.set_xlabel(f"{heading}, {'average over corpora' if corpus == AVERAGE else corpus}, with 95 % intervals")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_lengths(path: Path, records: Records, labels: Sequence[str] | None = None) -> None:
    """Plot bits per byte by prompt length, averaged over corpora (PackLLM Figure 4b)."""
    pyplot = _pyplot()
    lengths = list(scored(records)[0]["prompts"])
    columns: dict[str, list[float]] = {}
    for length in lengths:
        entries = lm_table(records, length)
        corpus = AVERAGE if any(entry.corpus == AVERAGE for entry in entries) else entries[0].corpus
        for entry in entries:
            wanted = not entry.method.startswith("member ") if labels is None else entry.method in labels
            if entry.corpus == corpus and wanted:
                columns.setdefault(entry.method, []).append(entry.score.value)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for label, values in columns.items():
        style = {"color": "black", "linestyle": "--"} if label == "best member" else {"marker": "o", "markersize": 3}
        axes.plot(range(len(lengths)), values, label=label, **style)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_xlabel("tokens of the prompt that the weights are from")
    axes.set_ylabel("bits/byte of the same text after it")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
