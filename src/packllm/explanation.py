"""Explanations of an answer: each member's share of every part of the prompt and every token of the answer. As numbers,
as HTML without scripts, and as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from packllm.carried import CarriedToken, Part
from packllm.errors import ExtraError

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
HEAD = 100
"""Characters of a part that are shown before it is unfolded."""

STYLE = """
.packllm{font:14px/1.5 system-ui,sans-serif;max-width:60em;color:#222;background:#fff;padding:1em}
.packllm td,.packllm th{padding:.2em .6em;text-align:left;vertical-align:top}
.packllm .bar{display:flex;width:9em;height:1em;margin-top:.25em}
.packllm .key{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 1em;vertical-align:-.1em}
.packllm .text{white-space:pre-wrap;overflow-wrap:anywhere}
.packllm summary{cursor:pointer}
"""


@dataclass(frozen=True)
class Explanation:
    """Each member's influence on the parts of the prompt and of the answer. Its texts are untrusted; html() escapes
    them.

    Attributes:
        names: the members.
        weights: the final weights, in the same order.
        unit: the unit of perplexities: token, word (members with several vocabularies) or byte.
        messages: the user's messages, as far as they are scored (see the option score_on); a text prompt is one
            message. Other messages are not scored.
        passages: the texts of the option `passages`, in its order.
        tokens: the answer's tokens, in order; empty after `weigh`.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    unit: str
    messages: tuple[Part, ...] = field(repr=False)
    passages: tuple[Part, ...] = field(default=(), repr=False)
    tokens: tuple[CarriedToken, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-safe values."""
        return {
            "names": list(self.names),
            "weights": list(self.weights),
            "unit": self.unit,
            "messages": [part.as_dict() for part in self.messages],
            "passages": [part.as_dict() for part in self.passages],
            "tokens": [token.as_dict() for token in self.tokens],
        }

    def html(self) -> str:
        """A complete page: no scripts, no external resources, all texts escaped."""
        return _page(self)

    def _repr_html_(self) -> str:
        """HTML for notebooks."""
        return _fragment(self)

    def plot(self) -> Any:
        """A matplotlib Figure: shares of the parts, and shares and weights over the answer.

        Raises:
            ExtraError: matplotlib is not installed.
        """
        return _figure(self)


def _page(explanation: Explanation) -> str:
    """A complete HTML page."""
    head = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>packllm: explanation</title></head>'
    return f"{head}<body>{_fragment(explanation)}</body></html>\n"


def _fragment(explanation: Explanation) -> str:
    """HTML to insert into another page."""
    colours = _colours(explanation)
    weight_of = dict(zip(explanation.names, explanation.weights, strict=True))
    keys = "".join(
        f'<span class="key" style="background:{colours[name]}"></span>{escape(name)} {value:.3f}'
        for name, value in weight_of.items()
    )
    parts = "".join(_row(label, part, colours) for label, part in _labelled(explanation))
    heads = "".join(f"<th>{escape(name)}</th>" for name in explanation.names)
    body = f"<h3>Prompt: shares, and perplexity per {escape(explanation.unit)}</h3>"
    body += f"<table><tr><th></th><th>share</th>{heads}<th>text</th></tr>{parts}</table>"
    if explanation.tokens:
        spans = "".join(_span(token, colours) for token in explanation.tokens)
        body += f'<h3>Answer: each token in the colour of its top member</h3><div class="text">{spans}</div>'
        body += f"<h3>Weights over the answer</h3>{_lines(explanation, colours)}"
    return f'<div class="packllm"><style>{STYLE}</style><p>Weights:{keys}</p>{body}</div>'


def _colours(explanation: Explanation) -> dict[str, str]:
    return {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(explanation.names)}


def _labelled(explanation: Explanation) -> list[tuple[str, Part]]:
    parts = [("message", explanation.messages), ("passage", explanation.passages)]
    return [(f"{kind} {at}", part) for kind, parts_of_kind in parts for at, part in enumerate(parts_of_kind, 1)]


def _row(label: str, part: Part, colours: Mapping[str, str]) -> str:
    bar = "".join(
        f'<span style="width:{100 * share:.1f}%;background:{colours[name]}"></span>'
        for name, share in part.share.items()
    )
    cells = "".join(f"<td>{_number(part.perplexity.get(name))}</td>" for name in colours)
    text = escape(part.text)
    if len(part.text) > HEAD:
        text = f"<details><summary>{escape(part.text[:HEAD])}…</summary>{text}</details>"
    share = f'<td title="{escape(_percentages(part.share))}"><div class="bar">{bar}</div></td>'
    return f'<tr><td>{label}</td>{share}{cells}<td class="text">{text}</td></tr>'


def _span(token: CarriedToken, colours: Mapping[str, str]) -> str:
    top = max(token.share, key=token.share.__getitem__)
    shade = round(0x99 * token.share[top])  # alpha of #rrggbbaa
    title = escape(f"{_percentages(token.share)}; log p {token.logprob:.3f}")
    return f'<span style="background:{colours[top]}{shade:02x}" title="{title}">{escape(token.text)}</span>'


def _lines(explanation: Explanation, colours: Mapping[str, str], width: int = 600, height: int = 120) -> str:
    """The weights at each token, as SVG."""
    low, high = _range(explanation.tokens)
    step = width / max(1, len(explanation.tokens) - 1)

    def line(name: str) -> str:
        values = [token.weights.get(name, 0.0) for token in explanation.tokens]
        values = values * 2 if len(values) == 1 else values
        points = " ".join(f"{at * step:.1f},{height * (high - v) / (high - low):.1f}" for at, v in enumerate(values))
        return f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"/>'

    polylines = "".join(line(name) for name in explanation.names)
    return f'<svg viewBox="-2 -2 {width + 4} {height + 4}" width="{width}" height="{height}">{polylines}</svg>'


def _range(tokens: Sequence[CarriedToken]) -> tuple[float, float]:
    """The range of the weights' axis: 0 to 1, wider if some weights are outside."""
    values = [value for token in tokens for value in token.weights.values()]
    return min(0.0, *values), max(1.0, *values)


def _percentages(share: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.0f}%" for name, value in share.items())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


def _figure(explanation: Explanation) -> Any:
    """The same content as a matplotlib Figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExtraError("Explanation.plot()", "matplotlib", "eval") from error

    labelled, tokens, colours = _labelled(explanation), explanation.tokens, _colours(explanation)
    heights = [0.5 * len(labelled) + 1.2, *([2.6] if tokens else [])]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    above, *below = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for at, (_, part) in enumerate(labelled):
        begin = 0.0
        for name, width in part.share.items():
            above.barh(at, width, left=begin, color=colours[name])
            begin += width
    labels = [f"{label}: {' '.join(part.text.split())[:40]}" for label, part in labelled]
    above.set(yticks=range(len(labels)), xlim=(0, 1), xlabel="share", title="Shares in the prediction of the prompt")
    above.set_yticklabels(labels, parse_math=False)  # texts may contain dollar signs
    above.invert_yaxis()
    for axes in below:
        bottom: list[float] = [0.0] * len(tokens)
        for name in explanation.names:
            share = [token.share.get(name, 0.0) for token in tokens]
            axes.bar(range(len(tokens)), share, bottom=bottom, width=1.0, color=colours[name], alpha=0.5)
            axes.plot([token.weights.get(name, 0.0) for token in tokens], color=colours[name], linewidth=2)
            bottom = [low + share_ for low, share_ in zip(bottom, share, strict=True)]
        axes.set(ylim=_range(tokens), ylabel="share (bars), weight (lines)", title="Shares and weights over the answer")
        if len(tokens) <= 40:
            axes.set_xticks(range(len(tokens)))
            texts = [token.text if token.text.isprintable() else repr(token.text)[1:-1] for token in tokens]
            axes.set_xticklabels(texts, rotation=90, parse_math=False)
    patches = [above.barh(0, 0, color=colours[name]) for name in explanation.names]
    figure.legend(patches, explanation.names, loc="outside lower center", ncols=4)
    return figure
