"""Benchmarks of weights that learn: what adapting adds to a step, members that sleep, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch

from packllm.decode.moving import Moving
from packllm.decode.sampling import make_sampler
from packllm.decode.tokens import Row
from packllm.engines.base import Read, read_together
from packllm.engines.member import Member
from packllm.pack import Pack
from packllm.weights import Weights, calibrate
from packllm.weights.calibrate import TOGETHER
from packllm_eval.bench.figures import pack_step
from packllm_eval.bench.measure import bar, ratio, timed
from packllm_eval.bench.report import Report
from packllm_eval.bench.speed import AGREE
from packllm_eval.bench.subjects import noisy_copy, prose

SMALL, ASLEEP = 0.02, 0.3
"""The weight of each member but the first, and a threshold that none of these reaches: they sleep all the time."""

OBSERVED = 200
"""Tokens to measure the cost of adapting on."""

ROWS, ROW = 30, 300
"""Rows of a calibration, and the characters of each."""


def moving(report: Report, members: Sequence[Member], text: str, tokens: int, repeat: int, rows: int = ROWS) -> None:
    """The most that sleeping can give, with one member awake: speed over all awake, of three separate models and of
    adapters of one base. The cost of adapting, and of calibration."""
    first = members[0]
    trio = [Member(first.merged(), first.tokenizer, "top", first.encoder)]
    trio += [noisy_copy(first, seed, AGREE) for seed in (1, 2)]
    for member in trio:
        member.end_ids = frozenset()
    kinds = {"models": trio}
    if len(members) > 1 and len({id(member.engine) for member in members}) == 1:
        kinds["adapters"] = list(members)
    times: dict[str, list[float]] = {}
    for _ in bar(range(repeat), "Weights that learn"):
        for kind, those in kinds.items():
            weights = {member.name: SMALL for member in those[1:]}
            weights[those[0].name] = 1 - sum(weights.values())
            pack = Pack(those, chat_template=False, max_tokens=tokens, weighting=weights, adapt=True, draft_tokens=1)
            for name, below in (("awake", 0.0), ("asleep", ASLEEP)):
                times.setdefault(f"token_{kind}_{name}", []).append(pack_step(pack, text, sleep=below))
        timed(times, "observed", _observe, trio)
        _calibration(times, members, rows)
    for kind in kinds:
        report.figures[f"moving.sleep_{kind}"] = ratio(times[f"token_{kind}_awake"], times[f"token_{kind}_asleep"])
    report.figures["moving.adapt"] = ratio([s / OBSERVED for s in times["observed"]], times["token_models_awake"])
    report.figures["moving.calibrate"] = ratio(times["calibrate"], times["calibrate_prefill"])
    report.seconds |= {name: median(values) for name, values in times.items()}


def _observe(members: Sequence[Member]) -> None:
    """Adapt to OBSERVED tokens."""
    size = len(members)
    weights = Weights((1 / size,) * size, tuple(m.name for m in members), "linear", (None,) * size, "token", "fixed")
    row = Row(weights, make_sampler(0.0, 1.0, None, None), moving=Moving(weights))
    parts = {k: torch.zeros(member.vocabulary_size) for k, member in enumerate(members)}
    for token in range(OBSERVED):
        row.observe(token % len(parts[0]), parts)


def _calibration(times: dict[str, list[float]], members: Sequence[Member], rows: int) -> None:
    """Seconds a token of a calibration, and of reading the same texts with scores, as every prompt is read."""
    text = prose()
    pieces = [text[at : at + ROW] for at in range(0, rows * ROW, ROW)]
    asked = [{"question": piece[: 2 * ROW // 3], "answer": piece[2 * ROW // 3 :]} for piece in pieces]
    prior = timed(times, "calibrate", calibrate, Pack(members, chat_template=False), asked)
    ids = [member.encoder.encode(piece).ids for piece in pieces for member in members]
    timed(times, "calibrate_prefill", _prefill, members, ids)
    times["calibrate"][-1] /= prior.worth.tokens
    times["calibrate_prefill"][-1] /= sum(map(len, ids))


def _prefill(members: Sequence[Member], rows: Sequence[Sequence[int]]) -> None:
    """Read and score rows, of the members in turn, as many together as calibration does."""
    for start in range(0, len(rows), TOGETHER * len(members)):
        group = rows[start : start + TOGETHER * len(members)]
        reads = [Read(members[at % len(members)].open(), ids[:-1], ids[1:]) for at, ids in enumerate(group)]
        read_together(reads)
        for read in reads:
            read.sequence.close()
