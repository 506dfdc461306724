"""Two tools for the agents of the examples, over the bundled passages: search them, look up a part's contents."""

# Without `from __future__ import annotations`: LlamaIndex needs a tool's annotations as types, not as text.
import functools
from typing import Literal

from embedding import MiniLM
from show import passages


@functools.cache
def _index() -> tuple[MiniLM, list[list[float]]]:
    model = MiniLM()
    return model, model.embed([f"{row['title']}\n{row['text']}" for row in passages()])


def search_passages(query: str) -> str:
    """The passage of the library that answers a question best."""
    model, vectors = _index()
    (wanted,) = model.embed([query])
    scores = [sum(map(float.__mul__, wanted, vector)) for vector in vectors]
    best = passages()[max(range(len(scores)), key=scores.__getitem__)]
    return f"{best['title']}: {best['text']}"


def look_up_table(domain: Literal["medicine", "law", "databases"]) -> str:
    """The table of contents of a part of the library: what its passages are about."""
    return "; ".join(row["title"] for row in passages() if row["domain"] == domain)
