"""The benchmarks, one function per group. Each adds its figures to a Report."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from statistics import median
from typing import Any

import torch

from packllm.chat.prompt import Encoded
from packllm.decode.line import Line, open_lines
from packllm.decode.request import Request
from packllm.engines.base import KeepsHidden
from packllm.engines.member import Member
from packllm.errors import VocabularyError, WeightsError
from packllm.options import make_options
from packllm.pack import Pack
from packllm.weights import find
from packllm.weights.scoring import weights_of
from packllm_eval.bench import company
from packllm_eval.bench.measure import bar, peak_mib, ratio, timed
from packllm_eval.bench.report import Report
from packllm_eval.bench.subjects import starter_is_here

WEIGHTINGS = ("em", "exact", "opt", "sim", "top1", "map")


def weighting(report: Report, members: Sequence[Member], text: str, repeat: int) -> None:
    """The time that each weighting adds to a scoring prefill, over the time of a bare prefill.

    The log-pool optimisers compute the scores together with other results, so the time of the scores alone is
    subtracted. All weightings start from the same passes, because passes vary by more than a weighting takes.
    """
    options = {name: make_options({"weighting": name}) for name in WEIGHTINGS}
    encoded = [member.encoder.encode(text) for member in members]
    times: dict[str, list[float]] = {}

    def passes(scored: bool) -> tuple[list[Line], list[torch.Tensor]]:
        results = [_read(member, e, scored) for member, e in zip(members, encoded, strict=True)]
        return [line for line, _ in results], [scores for _, scores in results]

    passes(False)  # the first pass over a new length is slower
    for _ in bar(range(repeat), "Weighting"):
        lines, _ = timed(times, "prefill", passes, False)
        scored_lines, logprobs = timed(times, "prefill_and_scores", passes, True)
        times.setdefault("scores", []).append(max(0.0, times["prefill_and_scores"][-1] - times["prefill"][-1]))
        sequences = [line.sequence for line in lines]
        for name in WEIGHTINGS:
            with suppress(WeightsError):  # members with different vocabularies: skip this weighting
                if find(name).needs_logits:
                    unread = [None] * len(members)
                    timed(times, f"scores_{name}", weights_of, members, sequences, encoded, unread, options[name])
                else:
                    timed(times, name, weights_of, members, sequences, encoded, logprobs, options[name])
        for line in [*lines, *scored_lines]:
            line.close()
    added = {name: times[name] for name in WEIGHTINGS if name in times}
    for name in WEIGHTINGS:
        if with_scores := times.get(f"scores_{name}"):
            added[name] = [a - b for a, b in zip(with_scores, times["scores"], strict=True)]
        report.figures[f"weighting.{name}"] = ratio(added.get(name), times["prefill"])
    report.figures["weighting.scoring"] = ratio(times["scores"], times["prefill"])
    report.figures["weighting.exact_over_opt"] = ratio(added.get("exact"), added.get("opt"))
    report.seconds |= {name: median(values) for name, values in times.items()}


def memory(report: Report, members: Sequence[Member], text: str) -> None:
    """MiB by which the peak of a weighted prefill exceeds that of a bare one; both keep all caches to the end."""
    variants = ("none", "em", "exact")
    for variant in variants:  # excludes what is only computed at the first call
        _prefill(members, text[:100], variant)
    peaks = {}
    for variant in bar(variants, "Memory"):
        peak = peak_mib(members, _prefill, members, text, variant)
        if peak is None:
            report.notes.append("memory: not measured, this system does not let a process reset its peak")
            return
        peaks[variant] = peak
    for name in ("em", "exact"):
        report.figures[f"memory.{name}"] = max(0.0, peaks[name] - peaks["none"])


def _prefill(members: Sequence[Member], text: str, weighting: str) -> None:
    """A request's prefill with a weighting; with "none" the members' bare prefill."""
    if weighting != "none":
        request = Request(members, make_options({"weighting": weighting}), [text])
        with suppress(WeightsError):
            request.prefill()
        request.close()
        return
    lines = [_read(member, member.encoder.encode(text), False)[0] for member in members]
    for line in lines:
        line.close()


def _read(member: Member, encoded: Encoded, scored: bool) -> tuple[Line, torch.Tensor]:
    """A member's line at the end of a prompt, and the scores if `scored`."""
    sequence = member.open()
    if isinstance(sequence.engine, KeepsHidden):
        sequence.engine.keep_hidden(sequence)
    lines, scores, failed = open_lines({0: (sequence, member, encoded.ids, encoded.positions if scored else ())})
    if failed:
        raise failed[0]
    return lines[0], scores[0]


def decoding(report: Report, members: Sequence[Member], text: str, tokens: int, repeat: int) -> None:
    """Seconds per token after the first, greedy: transformers.generate, each member alone, one-hot weights, all
    fused."""
    pack = Pack(members, chat_template=False, max_tokens=tokens)
    singles = [Pack([member], chat_template=False, max_tokens=tokens) for member in members]
    even = {member.name: 1 / len(members) for member in members}
    first = members[0]
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    pack_step(singles[0], text)
    _generate_step(first, text, tokens)
    for _ in bar(range(repeat), "Decoding"):
        for _ in range(3):  # equal times need more pairs to be shown as equal
            note("token_generate", _generate_step(first, text, tokens))
            note("token_pack_of_one", pack_step(singles[0], text))
        for at, single in enumerate(singles):
            note(f"token_alone_{at}", pack_step(single, text))
            if at == 0:  # measured right after the time that it is compared with
                note("token_one_hot", pack_step(pack, text, weighting={first.name: 1.0}))
        with suppress(VocabularyError):
            note("token_fused", pack_step(pack, text, weighting=even, decoding="tokens"))
    alone = [times[f"token_alone_{at}"] for at in range(len(members))]
    times["token_alone_sum"] = [sum(values) for values in zip(*alone, strict=True)]
    report.figures["decoding.alone"] = ratio(times["token_pack_of_one"], times["token_generate"])
    report.figures["decoding.one_hot"] = ratio(times["token_one_hot"], alone[0])
    report.figures["decoding.fused"] = ratio(times.get("token_fused"), times["token_alone_sum"])
    if len({id(member.engine) for member in members}) == 1:
        report.figures["decoding.one_batch"] = ratio(times["token_fused"], alone[0])
    report.seconds |= {name: median(values) for name, values in times.items()}


def pack_step(pack: Pack, text: str, **options: Any) -> float:
    generation = pack.generate(text, **options)
    timings = generation.timings
    return (timings["total"] - timings["first_token"]) / (generation.usage.completion_tokens - 1)


class _Clock:
    """A streamer for transformers.generate that records when tokens arrive; the prompt comes first."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, value: Any) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate_step(member: Member, text: str, tokens: int) -> float:
    ids = torch.tensor([member.encoder.encode(text).ids], device=member.model.device)
    settings = member.model.generation_config
    ends, settings.eos_token_id = settings.eos_token_id, None
    clock = _Clock()
    try:
        with torch.inference_mode():
            member.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=0,
                streamer=clock,
            )
    finally:
        settings.eos_token_id = ends
    return (clock.ticks[-1] - clock.ticks[1]) / (len(clock.ticks) - 2)


def start(report: Report, repeat: int, skip: bool) -> None:
    """Seconds of Pack.starter() in a new process, and of the whole process; conversions are done beforehand."""
    if skip:
        report.notes.append("start: not measured")
        return
    company.imports(report, repeat)
    if not starter_is_here():
        report.notes.append("start: the starter pack is absent")
        return
    program = (
        "import time; from packllm import Pack; t = time.perf_counter(); Pack.starter(); print(time.perf_counter() - t)"
    )
    for _ in bar(range(2), "Start"):
        started = time.perf_counter()
        process = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        report.figures["start.process"] = time.perf_counter() - started
        report.figures["start.load"] = float(process.stdout)
