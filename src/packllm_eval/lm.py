"""Protocol (a), language modelling: weights from the start of a document, bits per byte of the rest (PackLLM §4.1)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packllm.decode.mined import translated
from packllm.errors import DataError, OptionError
from packllm.pack import Pack
from packllm.weights import Weights, find
from packllm_eval.methods import Method, Ready, described, largest, one_vocabulary, ready
from packllm_eval.reading import Reading, cut_after
from packllm_eval.records import LEFT_OUT, run
from packllm_eval.rows import Document

PROMPT = "32|20%"
"""The paper's prompt: the first 32 tokens or the first 20 %, whichever is shorter."""

LENGTH = 512
"""A document is cut after this many tokens."""


@dataclass(frozen=True)
class PromptLength:
    """How much of a document the weights see: at most `tokens` tokens and at most `share` of it."""

    label: str
    tokens: int
    share: float

    @classmethod
    def parse(cls, text: str) -> PromptLength:
        """Parse "32", "20%" or "32|20%" (whichever is shorter)."""
        match = re.fullmatch(r"(\d+)?(?:(?:^|(?<=\d)\|)(\d+(?:\.\d+)?)%)?", text.strip())
        if not text.strip() or match is None:
            raise OptionError(f"prompt={text!r} is not a length; write tokens (32), a share (20%) or both (32|20%)")
        tokens = int(match[1]) if match[1] else 2**31
        share = float(match[2]) / 100 if match[2] else 1.0
        if tokens < 1 or not 0 < share <= 1:
            raise OptionError(f"prompt={text!r} must be at least one token, and at most 100%")
        return cls(text.strip(), tokens, share)

    def of(self, total: int) -> int:
        """Tokens of the prompt of a document with `total` tokens."""
        return max(1, min(self.tokens, int(total * self.share)))


def evaluate(
    pack: Pack,
    documents: Sequence[Document],
    path: Path,
    *,
    methods: Sequence[Method | str] | None = None,
    prompts: Sequence[str] = (PROMPT,),
    length: int = LENGTH,
    notes: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Compute a record per document: NLL of the text after the prompt, under every member alone and every method.

    Args:
        pack: the members; its options are the methods' defaults.
        documents: see rows.read_documents and rows.sample.
        path: .jsonl file of the records; an interrupted run is continued from it.
        methods: what to compare (see Method.parse); None for methods.DEFAULT.
        prompts: lengths of the prompt. With several, the scored text is what follows the longest one, so that
            only the weights differ.
        length: maximum tokens of a document, in the first member's tokens.
        notes: other facts that the records depend on (the seed of the sample), for the header.

    Returns:
        Records: id, corpus, `bytes` and `tokens` scored, `members` {name: nats}, `largest`, `seconds` {name: of pass},
        `prompts` {length: {"tokens": of the prompt, "methods": {label: {"nats", "weights", "pool", "seconds"}}}};
        or `left_out`, the reason, for a document that is too short or does not fit a member.

    Raises:
        OptionError, WeightsError: an unknown method, option or member, or an invalid fitted file.
        DataError: the file has other results, or no document could be scored.
    """
    checked = ready(pack, methods)
    lengths = [PromptLength.parse(text) for text in prompts]
    header = {
        "protocol": "lm",
        "members": [member.name for member in pack.members],
        "fingerprint": pack.fingerprint,
        "methods": described(checked),
        "prompts": [p.label for p in lengths],
        "length": length,
        **(notes or {}),
    }
    keep = any(reads_logits(m) for m in checked)

    def work(document: Document) -> dict[str, Any]:
        try:
            return _score(pack, document, checked, lengths, length, keep)
        except LEFT_OUT as error:
            return {"left_out": str(error)}

    records = run(documents, work, path, header, "Documents")
    if records and all("left_out" in record for record in records):
        raise DataError(f"no document could be scored; the first: {records[0]['left_out']}")
    return records


def reads_logits(method: Ready) -> bool:
    """Whether a method needs more than the members' log-probabilities of the observed tokens."""
    weighting = method.options.weighting
    if isinstance(weighting, dict):
        return method.options.pool == "log"
    strategy = find(weighting)
    return strategy.needs_logits or (method.options.pool or strategy.pool) == "log"


def _score(
    pack: Pack,
    document: Document,
    methods: Sequence[Ready],
    lengths: Sequence[PromptLength],
    length: int,
    keep: bool,
) -> dict[str, Any]:
    encoder = pack.members[0].encoder
    total = min(length, len(encoder.encode(document.text).positions))
    text = document.text[: cut_after(encoder, document.text, total)]
    cuts = {p.label: cut_after(encoder, text, p.of(total)) for p in lengths}
    ends = sorted(set(cuts.values()))
    if ends[-1] >= len(text) or not text[ends[-1] :].strip():
        raise DataError(f"document {document.id} of {total} tokens has nothing after its prompt")
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    all_members = range(len(pack.members))
    with Reading(pack.models, pieces, keep) as reading:
        last = len(pieces)
        singles = [((k,), alone(pack, k)) for k in all_members]
        weightings: list[tuple[Sequence[int], Weights]] = [*singles]
        results: list[tuple[str, Ready, Weights, float]] = []
        mined: dict[int, float] = {}
        for prompt, end in cuts.items():
            for method in methods:
                started, pieces_seen = time.perf_counter(), ends.index(end) + 1
                if method.options.decoding == "mined" and not one_vocabulary(pack, method.members):
                    weights, mined[len(results)] = _mined(pack, reading, method, pieces, pieces_seen)
                    weightings.append(singles[0])  # placeholder
                else:
                    weights = reading.weights(method.options, method.members, pieces_seen)
                    weightings.append((method.members, weights))
                results.append((prompt, method, weights, time.perf_counter() - started))
        nats = reading.nll(weightings, last - 1, last)
        for at, value in mined.items():
            nats[len(singles) + at] = value
        by_prompt: dict[str, Any] = {
            prompt: {"tokens": reading.counts(0, 0, ends.index(end) + 1), "methods": {}} for prompt, end in cuts.items()
        }
        for (prompt, method, weights, seconds), value in zip(results, nats[len(singles) :], strict=True):
            by_prompt[prompt]["methods"][method.label] = {
                "nats": value,
                "weights": dict(zip(weights.names, weights.values, strict=True)),
                "pool": weights.pool,
                "seconds": seconds,
            }
        return {
            "bytes": len(reading.spans(last - 1, last).encode()),
            "tokens": reading.counts(0, last - 1, last) if one_vocabulary(pack, all_members) else None,
            "members": dict(zip((m.name for m in pack.members), nats[: len(singles)], strict=True)),
            "largest": largest(pack),
            "seconds": dict(zip((m.name for m in pack.members), reading.seconds, strict=True)),
            "prompts": by_prompt,
        }


def _mined(
    pack: Pack, reading: Reading, method: Ready, pieces: Sequence[str], pieces_seen: int
) -> tuple[Weights, float]:
    """Weights and NLL of the last piece through MinED (PackLLM §3.4), in the tokens of the member with the lowest NLL
    per byte on the first `seen` pieces; the other members are mapped to these tokens."""
    lowest = reading.weights(pack.options.override({"weighting": "top1", "unit": "byte"}), method.members, pieces_seen)
    reference = pack.models[method.members[lowest.values.index(1.0)]]
    others = [pack.models[k] for k in method.members]
    members = [
        member if member.vocabulary.same_as(reference.vocabulary) else translated([member], reference)[0]
        for member in others
    ]
    all_members = range(len(members))
    with Reading(members, pieces, reads_logits(method)) as mapped_reading:
        weights = mapped_reading.weights(method.options, all_members, pieces_seen)
        return weights, mapped_reading.nll([(all_members, weights)], len(pieces) - 1, len(pieces))[0]


def alone(pack: Pack, k: int) -> Weights:
    """Weights of one member alone."""
    return Weights((1.0,), (pack.members[k].name,), "linear", (None,), "token", "fixed")


def bits_per_byte(nats: float, size: float) -> float:
    """Convert nats on `size` bytes to bits per byte."""
    return nats / math.log(2) / size
