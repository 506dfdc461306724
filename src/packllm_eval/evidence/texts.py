"""What a written answer shares with the gold answer, and with itself."""

from __future__ import annotations

import re
from collections import Counter


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def holds(text: str, gold: str) -> bool:
    """Whether the words of `gold` occur in a text, in their order."""
    return " ".join(words(gold)) in " ".join(words(text))


def f1(text: str, gold: str) -> float:
    """F1 of the words, as in SQuAD."""
    a, b = Counter(words(text)), Counter(words(gold))
    common = sum((a & b).values())
    return 2 * common / (sum(a.values()) + sum(b.values())) if common else 0.0


def repeated(text: str) -> float:
    """Share of word 3-grams that occurred earlier in the text."""
    tokens = words(text)
    grams = [*zip(tokens, tokens[1:], tokens[2:], strict=False)]
    return 1 - len({*grams}) / len(grams) if grams else 0.0
