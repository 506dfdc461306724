"""Compare rules that rate segments, on real text. Members with different vocabularies read documents word by word, and
propose a continuation at each position; each rule picks one proposal. A pick is right if the text continues with it.

Run by `study.py segments`; the rules are those of packllm.decode.segments.rate.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, get_args

from packllm import Pack
from packllm.decode.sampling import Greedy
from packllm.decode.segments import rate
from packllm.decode.writer import Segment, Writer
from packllm.options import Scoring
from packllm_eval import records, rows

RULES = get_args(Scoring)

PLACES = 40
"""Most positions per document."""

START = 0.2, 240
"""Text before the first position: a share of the document, and a limit in characters."""


def evaluate(pack: Pack, documents: list[rows.Document], path: Path) -> list[dict[str, Any]]:
    """One record per document: the number of positions; of those where proposals `differ`; of these the `decided` ones,
    where some proposals are right and some wrong; and how many of them are `right`, per rule and per member."""
    header = {"protocol": "segments", "fingerprint": pack.fingerprint, "places": PLACES}
    return records.run(documents, lambda document: _read(pack, document.text), path, header, "Documents")


def _read(pack: Pack, text: str) -> dict[str, Any]:
    words = re.findall(r"\s*\S+", text)
    start = 1
    while start < len(words) - 1 and len("".join(words[: start + 1])) < min(START[0] * len(text), START[1]):
        start += 1
    prompt = "".join(words[:start])
    weights = pack.weigh(prompt)
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {}
        for k, member in enumerate(pack.members):
            ids = member.encoder.encode(prompt).ids
            session = member.open([ids])
            session.prefill([[]])
            writers[k] = stack.enter_context(closing(Writer(session, len(ids))))
        encoders = [member.encoder for member in pack.members]
        places = range(start, min(start + PLACES, len(words)))
        for at in places:
            truth = "".join(words[at:])
            proposals = {k: writer.propose(Greedy(), encoders, 16) for k, writer in writers.items()}
            segments = list(dict.fromkeys(proposals.values()))
            right = {s: truth.startswith(s.text) and bool(s.text) and not s.ends for s in segments}
            counts["differ"] += len(segments) > 1
            if len(set(right.values())) > 1:
                counts["decided"] += 1
                judged = {k: writer.judge(segments) for k, writer in writers.items()}
                for rule in RULES:
                    ratings = [
                        rate(s, {k: judged[k][i] for k in judged}, weights, rule) for i, s in enumerate(segments)
                    ]
                    counts[rule] += right[segments[max(range(len(segments)), key=ratings.__getitem__)]]
                for k, segment in proposals.items():
                    counts[pack.members[k].name] += right[segment]
            for writer in writers.values():
                writer.accept(Segment(words[at]))
    chances = {name: counts[name] for name in [*RULES, *(m.name for m in pack.members)]}
    return {"places": len(places), "differ": counts["differ"], "decided": counts["decided"], "right": chances}


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: how often each rule, and each member, was right at the decided positions."""
    decided = sum(record["decided"] for record in records)
    lines = [
        f"{sum(r['places'] for r in records)} places in {len(records)} documents; proposals differed at "
        f"{sum(r['differ'] for r in records)}; at {decided} of them some were right and some wrong.",
        "",
        "| who chooses | right | share |",
        "|---|---|---|",
    ]
    for name in records[0]["right"]:
        right = sum(record["right"][name] for record in records)
        lines.append(f"| {name} | {right} | {right / max(1, decided):.3f} |")
    return "\n".join(lines) + "\n"
