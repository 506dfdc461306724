"""How well a minimum edit distance mapping represents one vocabulary in another: packllm align."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packllm.align.mined import ROLE, alignment
from packllm.align.vocabulary import Vocabulary
from packllm.chat.prompt import Encoder
from packllm.engines.transformers.gguf import converted
from packllm.errors import LoadError, VocabularyError

BAR = 30  # width of the bar for a share of 1
WORST = 8  # how many of the worst tokens to list
SHOWN = 28  # printed characters of a token, at most
STEPS = ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 8), (9, 16), (17, None))
"""Ranges of distances that form one line of the histogram."""


@dataclass(frozen=True)
class Coverage:
    """How well a target vocabulary represents the tokens of a reference vocabulary.

    Attributes:
        reference, target: names of the two.
        sizes: number of ids of the reference and of the target.
        distances: number of the reference's text tokens by edit distance in bytes; 0 is an exact match.
        matched: number of special tokens of the reference that the target has in the same role.
        alone: number of special and unused ids of the reference without a counterpart.
        worst: the text tokens with the largest distances: (token, nearest, distance).
    """

    reference: str
    target: str
    sizes: tuple[int, int]
    distances: dict[int, int]
    matched: int
    alone: int
    worst: list[tuple[str, str, int]]

    @property
    def text(self) -> int:
        """Number of the reference's text tokens."""
        return sum(self.distances.values())

    @property
    def exact(self) -> int:
        return self.distances.get(0, 0)

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "reference": {"name": self.reference, "size": self.sizes[0]},
            "target": {"name": self.target, "size": self.sizes[1]},
            "text_tokens": self.text,
            "exact": self.exact,
            "exact_share": self.exact / self.text if self.text else None,
            "distances": self.distances,
            "special_matched": self.matched,
            "without_counterpart": self.alone,
            "worst": [{"token": a, "nearest": b, "distance": d} for a, b, d in self.worst],
        }


def measure(reference: str, target: str) -> Coverage:
    """Measure how well one vocabulary represents another; see read() for valid names.

    Raises:
        LoadError: a name has no tokenizer.
    """
    one, two = read(reference), read(target)
    mapping = alignment(one, two)
    distances = mapping.distances.tolist()
    farthest = sorted((-distance, i) for i, distance in enumerate(distances) if distance > 0)[:WORST]
    return Coverage(
        reference=_name(reference),
        target=_name(target),
        sizes=(len(one), len(two)),
        distances=dict(sorted(Counter(d for d in distances if d >= 0).items())),
        matched=distances.count(ROLE),
        alone=sum(distance < ROLE for distance in distances),
        worst=[(_shown(one.tokens[i]), _shown(two.tokens[int(mapping.ids[i])]), -distance) for distance, i in farthest],
    )


def read(spec: str) -> Vocabulary:
    """The vocabulary of a hub id, a model's or tokenizer's folder, a .gguf file or a tokenizer.json (also .gz).

    Raises:
        LoadError: there is no tokenizer, or it cannot be read.
    """
    path = Path(spec)
    if path.is_file() and path.suffix != ".gguf":
        return _from_file(path)
    if path.is_dir() and (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
        return _from_file(path / "tokenizer.json")
    from transformers import AutoTokenizer

    try:
        source = converted(path) if path.is_file() else spec
        return Encoder(AutoTokenizer.from_pretrained(source)).vocabulary
    except LoadError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadError(f"cannot load a tokenizer from {spec!r}: {reason}") from error


def _from_file(path: Path) -> Vocabulary:
    try:
        content = path.read_bytes()
        return Vocabulary.from_json(json.loads(gzip.decompress(content) if path.suffix == ".gz" else content))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, VocabularyError) as error:
        raise LoadError(f"{str(path)!r} is no tokenizer.json: {type(error).__name__}: {error}") from error


def _name(spec: str) -> str:
    return Path(spec).absolute().name if Path(spec).exists() else spec


def _shown(token: bytes) -> str:
    text = repr(token.decode(errors="backslashreplace"))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 2]}…{text[-1]}"


def show(coverage: Coverage, console: Console) -> None:
    """Print two tables: a histogram of distances, and the tokens with the largest distances."""
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    sizes = f"{coverage.reference} ({coverage.sizes[0]:,} ids) in {coverage.target} ({coverage.sizes[1]:,} ids)"
    console.print(Text(sizes, style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("edit distance", "tokens", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", min_width=BAR)
    for low, high in STEPS:
        count = sum(n for d, n in coverage.distances.items() if low <= d and (high is None or d <= high))
        share = count / max(coverage.text, 1)
        name = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        name = "0 (exact)" if low == high == 0 else name
        bar = Text(block * round(BAR * share), style="green" if low == 0 else "yellow")
        table.add_row(name, f"{count:,}", f"{share:.1%}", bar)
    console.print(table)
    special = f"{coverage.matched} special tokens matched by role, {coverage.alone} ids without a counterpart"
    console.print(Text(special, style="dim"))
    if coverage.worst:
        worst = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        worst.add_column("farthest", no_wrap=True)
        worst.add_column("nearest to it", no_wrap=True)
        worst.add_column("distance", justify="right")
        for token, nearest, distance in coverage.worst:
            worst.add_row(Text(token), Text(nearest), str(distance))
        console.print(worst)
