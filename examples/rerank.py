"""Put passages in order by what explains the question: the pack, each member alone, and MiniLM's cosine.

    python examples/rerank.py --shared ../shared --questions 200

Questions and answers are MedQuAD's, of documents that no expert was trained on. For each question: its own answer
among others of the same corpus, first those about the same disease (which answer another question), then any. Passages
are cut to their first words. Prints recall@1 and @5 and seconds, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from embedding import MiniLM
from train_expert import read_documents

from packllm import Pack, starter

CORPUS = "corpora/medicine_medquad.jsonl.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with corpora/")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--words", type=int, default=100, help="length that passages are cut to")
    parser.add_argument("--members", nargs="+", default=["general", "medicine", "law", "databases"])
    parser.add_argument("--timed", type=int, default=3, help="questions that everybody reads anew, to take the time")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop asking after so long")
    args = parser.parse_args()

    torch.set_num_threads(1)
    specs = {spec.partition("=")[0]: spec for spec in starter.specs()}
    pack = Pack.load([specs[name] for name in args.members])
    minilm = MiniLM()

    def cosine(question: str, passages: Sequence[str], **options: Any) -> list[float]:
        first, *others = torch.tensor(minilm.embed([question, *passages]))
        return [float(first @ other) for other in others]

    alone = {name: partial(pack.relevance, weighting={name: 1.0}) for name in args.members}
    raters: dict[str, Callable[..., list[float]]] = {"pack": pack.relevance, **alone, "MiniLM cosine": cosine}
    ranks: dict[str, list[int]] = {name: [] for name in raters}
    seconds: dict[str, list[float]] = {name: [] for name in ranks}
    end = time.monotonic() + 60 * args.minutes
    for at, (question, passages) in enumerate(asked(args)):
        if time.monotonic() > end:
            break
        for name, rate in raters.items():
            start = time.perf_counter()
            # After the pack, its members find the passages read; the time counts where they do not.
            own, *others = rate(question, passages, **({"prefix_cache_mb": 0} if at < args.timed else {}))
            if at < args.timed:
                seconds[name].append(time.perf_counter() - start)
            ranks[name].append(1 + sum(other >= own for other in others))  # its own answer is the first; ties are lost
        print(f"{at + 1} questions", {name: found[-1] for name, found in ranks.items()}, file=sys.stderr, flush=True)
    show(ranks, seconds, args)


def asked(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Questions, each with its candidates, its own answer first."""
    documents = [one for one in read_documents(args.shared / CORPUS, "focus") if one.held_out and one.answer.strip()]
    draw = random.Random(0)
    draw.shuffle(documents)

    def cut(text: str) -> str:
        return " ".join(text.split()[: args.words])

    found = []
    for own in documents[: args.questions]:
        near = [one for one in documents if one.key == own.key and one.question != own.question]
        others = near + draw.sample(documents, len(documents))
        answers = dict.fromkeys([cut(own.answer), *(cut(one.answer) for one in others)])
        found.append((own.question, list(answers)[: args.candidates]))
    return found


def show(ranks: dict[str, list[int]], seconds: dict[str, list[float]], args: argparse.Namespace) -> None:
    rows = {}
    for name, found in ranks.items():
        n = len(found)
        rows[name] = {
            "recall@1": sum(one <= 1 for one in found) / n,
            "recall@5": sum(one <= 5 for one in found) / n,
            "seconds": sum(seconds[name]) / max(1, len(seconds[name])),
        }
        print(f"{name:16}" + "  ".join(f"{key} {value:.3f}" for key, value in rows[name].items()))
    print(json.dumps({"questions": n, "candidates": args.candidates, "words": args.words, "rows": rows}))


if __name__ == "__main__":
    main()
