"""Draw the pictures of docs/weights.md with the starter pack: python docs/pictures.py

It needs `make setup` and takes about a minute. The passages are those of examples/data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from packllm import Pack
from packllm.decode.pool import fuse
from packllm.engines.base import Read
from packllm.explanation import COLOURS
from packllm.weights import Adaptive, em

HERE = Path(__file__).parent / "pictures"
PASSAGES = [json.loads(line) for line in (HERE.parents[1] / "examples/data/passages.jsonl").open(encoding="utf-8")]
PROMPTS = {
    "asthma": "Asthma is a chronic disease in which the airways swell. Symptoms include wheezing.",
    "a statute": "Any person who knowingly violates this section shall be fined under this title, imprisoned, or both.",
    "an index": "CREATE INDEX builds an index on the specified columns of a table to enhance query performance.",
}


def text_of(title: str) -> str:
    return next(row["text"] for row in PASSAGES if row["title"] == title)


def logprobs(pack: Pack, text: str) -> np.ndarray:
    """(K, t): what each member gives each token of a text but the first."""
    rows = []
    for member in pack.models:
        ids, sequence = member.encoder.plain(text), member.open()
        (given,) = sequence.engine.read([Read(sequence, ids, [*ids[1:], -1])])
        assert isinstance(given, torch.Tensor), given
        rows.append(given[:-1].numpy())
        sequence.close()
    return np.stack(rows)


def stacked(axes: Axes, names: Sequence[str], shares: np.ndarray) -> None:
    """Horizontal bars of shares (bars, K)."""
    begin = np.zeros(len(shares))
    for k, name in enumerate(names):
        axes.barh(range(len(shares)), shares[:, k], left=begin, color=COLOURS[k], label=name)
        begin += shares[:, k]
    axes.invert_yaxis()


def prompts(pack: Pack) -> Figure:
    """From perplexities to weights."""
    names, figure = [member.name for member in pack.members], Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    weights = [pack.weigh(text, chat_template=False) for text in PROMPTS.values()]
    for k in range(len(names)):
        at = np.arange(len(PROMPTS)) + 0.2 * (k - 1.5)
        left.barh(at, [one.nll[k] or 0 for one in weights], height=0.18, color=COLOURS[k])
    left.invert_yaxis()
    left.set(yticks=range(len(PROMPTS)), yticklabels=PROMPTS, xlabel="NLL, nats a token (lower is better)")
    stacked(right, names, np.array([one.values for one in weights]))
    right.set(yticks=range(len(PROMPTS)), yticklabels=[], xlim=(0, 1), xlabel="weight (em)")
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def length(pack: Pack) -> Figure:
    """The same text, more and more of it."""
    names, given = (
        [member.name for member in pack.members],
        logprobs(pack, text_of("Evidence: cross-examination and leading questions")),
    )
    counts = range(1, given.shape[1] + 1)
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    means = np.stack([-given[:, :n].mean(1) for n in counts])
    ways = {
        "em": np.array([em(torch.from_numpy(given[:, :n])) for n in counts]),
        "sim, tau=0.1": np.array([torch.softmax(torch.from_numpy(-mean / 0.1), 0).tolist() for mean in means]),
    }
    for axes, (way, weights) in zip(figure.subplots(1, 2, sharey=True), ways.items(), strict=True):
        for k, name in enumerate(names):
            axes.plot(counts, weights[:, k], color=COLOURS[k], label=name)
        axes.set(title=way, xlabel="tokens scored", ylim=(0, 1))
    figure.axes[0].set_ylabel("weight")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def pools() -> Figure:
    """Two made-up distributions of the next word, and what the two pools make of them at equal weights."""
    words = ["dose", "court", "table", "the", "is"]
    p = np.array([[0.60, 0.01, 0.04, 0.20, 0.15], [0.02, 0.55, 0.03, 0.22, 0.18]])
    parts = torch.from_numpy(p).log()
    drawn = {"member 1": p[0], "member 2": p[1]}
    drawn |= {f"{pool} pool": fuse(parts, (0.5, 0.5), pool).exp().numpy() for pool in ("linear", "log")}
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    colours = [COLOURS[0], COLOURS[1], "#555555", "#999999"]
    for axes, (name, values), colour in zip(figure.subplots(1, 4, sharey=True), drawn.items(), colours, strict=True):
        axes.bar(words, values, color=colour)
        axes.set(title=name, ylim=(0, 0.7))
        axes.tick_params(axis="x", rotation=60)
    figure.axes[0].set_ylabel("probability")
    return figure


def adapting(pack: Pack) -> Figure:
    """A text that changes its subject: weights that stay, and weights that learn."""
    names = [member.name for member in pack.members]
    medicine, law = text_of("Croup"), text_of("Patents: time limit on damages")
    given = np.exp(logprobs(pack, f"{medicine}\n\n{law}"))
    turn, start = len(pack.tokenize(medicine)), 32
    weights = em(torch.from_numpy(np.log(given[:, :start])))
    adaptive, path = Adaptive(weights), []
    for column in given[:, start:].T:
        path.append(adaptive.weights())
        adaptive.observe(column)
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    at = range(start, given.shape[1])
    for k, name in enumerate(names):
        axes.plot(at, [float(one[k]) for one in path], color=COLOURS[k], label=name)
        axes.hlines(weights[k], start, given.shape[1], color=COLOURS[k], linestyle=":", linewidth=1)
    axes.axvline(turn, color="#888888", linewidth=1)
    axes.set(xlabel="token of the text; at the line it turns from medicine to law", ylabel="weight", ylim=(0, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def explained(pack: Pack) -> Figure:
    """What Explanation.plot() draws of a RAG answer."""
    passages = [text_of("Croup"), text_of("Hash indexes: when they are fastest")]
    prompt = "\n\n".join(["Use the context.", *passages, "How long does croup last in a child?"])
    return pack.generate(prompt, passages=passages, max_tokens=32).explanation.plot()


def main() -> None:
    # The same numbers give the same file; letters stay letters, which keeps files small.
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "packllm",
        "font.size": 9,
        "font.family": "sans-serif",
    }
    HERE.mkdir(exist_ok=True)
    with Pack.starter() as pack:
        figures = {"prompts": prompts(pack), "length": length(pack), "pools": pools(), "adapting": adapting(pack)}
        figures["explanation"] = explained(pack)
    for name, figure in figures.items():
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
        print(HERE / f"{name}.svg")


if __name__ == "__main__":
    main()
