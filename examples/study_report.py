"""Tables and plots of `docs/results.md`, from the existing records of study.py:

    python examples/study_report.py --data study --out docs/results

Writes Markdown tables, JSON and plots, named after the studies.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import segments
from study import COUNTED, COUNTS, FIVE, LENGTHS

from packllm_eval import records, report, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of study.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables and plots")
    args = parser.parse_args()
    if (path := args.data / "records" / "corpora.jsonl").exists():
        found_records = records.read(path)
        entries = tables.lm_table(found_records, base="em", best_of=FIVE)
        write(args.out, "corpora_by_corpus", report.grid(entries), [])
        write(args.out, "corpora", report.markdown(averages(entries), report.LM, True, "em"), averages(entries))
        report.plot_scores(args.out / "corpora.png", entries, "bits/byte", tables.AVERAGE)
        report.plot_weights(args.out / "weights.png", entries, "em")
    if (path := args.data / "records" / "words.jsonl").exists():
        found_records = records.read(path)
        entries = tables.lm_table(found_records)
        write(args.out, "words_by_corpus", report.grid(entries), [])
        write(args.out, "words", report.markdown(averages(entries), report.LM, True), averages(entries))
    if (path := args.data / "records" / "eight.jsonl").exists():
        entries = tables.lm_table(records.read(path), base="em K=8")
        write(args.out, "eight_by_corpus", report.grid(entries), [])
        write(args.out, "eight", report.markdown(averages(entries), report.LM, True, "em K=8"), averages(entries))
        plot_counts(args.out / "eight.png", averages(entries))
    if (path := args.data / "records" / "grid.jsonl").exists():
        found_records = records.read(path)
        costs = tables.costs(found_records)
        lines = [
            f"| {e.method} | {costs[e.method]:.3f} | {e.score.value:.4f} | {e.score.low:.4f} to {e.score.high:.4f} |"
            for e in averages(tables.lm_table(found_records))
            if e.method in costs
        ]
        head = "| method | passes of one member | bits/byte | 95 % interval |\n|---|---|---|---|\n"
        write(args.out, "grid", head + "\n".join(lines) + "\n", [])
    if (path := args.data / "records" / "segments.jsonl").exists():
        write(args.out, "segments", segments.table(records.read(path)), [])
    if (path := args.data / "records" / "length.jsonl").exists():
        found_records = records.read(path)
        parts, entries = [], []
        for length in LENGTHS:
            entries = tables.lm_table(found_records, length)
            parts.append(f"## Prompt of {length} tokens\n\n" + report.markdown(averages(entries), report.LM, True))
        write(args.out, "length", "\n".join(parts), entries)
        report.plot_lengths(args.out / "length.png", found_records)
    for name in ("choice", "plain"):
        found_records = [
            {**record, "corpus": path.stem}
            for path in sorted((args.data / "records" / name).glob("*.jsonl"))
            for record in records.read(path)
        ]
        if found_records:
            entries = tables.choice_table(found_records, best_of=FIVE)
            write(args.out, f"{name}_by_task", report.grid(entries), [])
            write(args.out, name, report.markdown(entries, report.CHOICE, False), entries)
            report.plot_scores(args.out / f"{name}.png", entries, "accuracy", entries[-1].corpus)
    if (path := args.data / "records" / "generate.jsonl").exists():
        entries = tables.generate_table(records.read(path), best_of=FIVE)
        write(args.out, "generate", report.markdown(entries, report.GENERATE, False), entries)


def averages(entries: list[tables.Entry]) -> list[tables.Entry]:
    return [entry for entry in entries if entry.corpus == tables.AVERAGE]


def plot_counts(path: Path, entries: list[tables.Entry]) -> None:
    """Plot bits per byte against the number of members, one line per weighting (PackLLM Figure 3)."""
    import matplotlib.pyplot as pyplot

    scores = {entry.method: entry.score for entry in entries}
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for weighting in COUNTED:
        found_records = [scores[f"{weighting} K={count}"] for count in COUNTS]
        axes.plot(
            range(len(COUNTS)), [score.value for score in found_records], marker="o", markersize=3, label=weighting
        )
    axes.axhline(scores["best member"].value, color="black", linestyle="--", label="best member of each corpus")
    axes.set_xticks(range(len(COUNTS)), map(str, COUNTS))
    axes.set_xlabel("members")
    axes.set_ylabel("bits/byte, average over corpora")
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(out: Path, name: str, text: str, entries: list[tables.Entry]) -> None:
    (out / f"{name}.md").write_text(f"# {name}\n\n{text}", encoding="utf-8")
    if entries:
        table = [{**entry.as_dict(), "weights": None} for entry in entries]
        (out / f"{name}.json").write_text(json.dumps(table, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
