"""Benchmarks of faster decoding: speculation, adapters in one pass, prefix reuse, batches, the naive loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from packllm.decode.pool import fuse
from packllm.engines.member import Member
from packllm.pack import Pack
from packllm.results import Generation
from packllm.weights.blocks import STEPS
from packllm_eval.bench.figures import pack_step
from packllm_eval.bench.measure import bar, ratio, synchronize
from packllm_eval.bench.report import Report
from packllm_eval.bench.subjects import noisy_copy

MODES = ("cool", "cool+rerank", "mined")

AGREE = 0.02
"""Noise in the weights of the copies for speculation, relative to a matrix's standard deviation."""

QUESTIONS = ("\n\nQuestion: what does this say first?\nAnswer:", "\n\nQuestion: and what does it say last?\nAnswer:")


def speculation(report: Report, members: Sequence[Member], text: str, tokens: int, repeat: int) -> None:
    """Three separate models that mostly agree: seconds per token of speculative and plain decoding, and of the top
    one."""
    first = members[0]
    trio = [Member(first.merged(), first.tokenizer, "top", first.encoder)]
    trio += [noisy_copy(first, seed, AGREE) for seed in (1, 2)]
    for member in trio:
        member.end_ids = frozenset()
    pack, alone = (
        Pack(trio, chat_template=False, max_tokens=tokens),
        Pack(trio[:1], chat_template=False, max_tokens=tokens),
    )
    weights = {trio[0].name: 0.5, trio[1].name: 0.25, trio[2].name: 0.25}
    times: dict[str, list[float]] = {}
    pack_step(pack, text, weighting=weights)
    for _ in bar(range(repeat), "Speculation"):
        times.setdefault("token_plain", []).append(pack_step(pack, text, weighting=weights, draft_tokens=1))
        times.setdefault("token_speculative", []).append(pack_step(pack, text, weighting=weights))
        times.setdefault("token_top_alone", []).append(pack_step(alone, text))
    report.figures["speed.speculative"] = ratio(times["token_plain"], times["token_speculative"])
    report.figures["speed.speculative_top"] = ratio(times["token_top_alone"], times["token_speculative"])
    report.seconds |= {name: median(values) for name, values in times.items()}


def prefix(report: Report, members: Sequence[Member], context: str, repeat: int) -> None:
    """The time to the first token of a second question over the same context, over that of the first question."""
    times: dict[str, list[float]] = {}
    for _ in bar(range(repeat), "Prefix"):
        pack = Pack(members, chat_template=False, max_tokens=1)
        for name, question in zip(("first_question", "second_question"), QUESTIONS, strict=True):
            synchronize()
            times.setdefault(name, []).append(pack.generate(context + question).timings["first_token"])
    report.figures["speed.second_question"] = ratio(times["second_question"], times["first_question"])
    report.seconds |= {name: median(values) for name, values in times.items()}


def batches(report: Report, members: Sequence[Member], text: str, tokens: int, repeat: int) -> None:
    """Tokens per second of eight prompts decoded together, over those of one."""
    if not _one_vocabulary(members):
        return
    pack = Pack(members, chat_template=False, max_tokens=tokens, batch_size=8, min_weight=0.0)
    even = {member.name: 1 / len(members) for member in members}
    prompts = [text[at:] for at in range(8)]
    times: dict[str, list[float]] = {}
    pack.generate(text, weighting=even)
    for _ in bar(range(repeat), "Batches"):
        for name, group in (("one", prompts[:1]), ("eight", prompts)):
            timings = pack.generate_batch(group, weighting=even)[-1].timings
            times.setdefault(f"token_batch_of_{name}", []).append(
                (timings["total"] - timings["first_token"]) / len(group)
            )
    report.figures["speed.batch"] = ratio(times["token_batch_of_one"], times["token_batch_of_eight"])
    report.seconds |= {name: median(values) for name, values in times.items()}


def naive(report: Report, members: Sequence[Member], text: str, tokens: int, samples: int) -> None:
    """The loop of the paper's released code: for each token all members read everything again and the weights are
    solved again. Its time over ours with the same weighting, measured at `samples` of the `tokens` steps."""
    if not _one_vocabulary(members):
        return
    trio = members[:3]
    pack = Pack(trio, chat_template=False, max_tokens=tokens, weighting="opt", min_weight=0.0)
    generation = pack.generate(text)
    ours = generation.timings["total"] / generation.usage.completion_tokens
    ids = trio[0].encoder.encode(text).ids
    models = [member.merged() for member in trio]
    times = []
    for at in bar([round(i * (tokens - 1) / max(samples - 1, 1)) for i in range(samples)], "Naive loop"):
        ids_so_far = torch.tensor(ids + ids[:at])[None]
        synchronize()
        started = time.perf_counter()
        _naive_step(trio, models, ids_so_far, len(ids))
        synchronize()
        times.append(time.perf_counter() - started)
    report.figures["speed.naive"] = sum(times) / len(times) / ours
    report.seconds |= {"token_naive": sum(times) / len(times), "token_ours": ours}


def modes(report: Report, members: Sequence[Member], text: str, tokens: int, repeat: int) -> None:
    """Each decoding of members with several vocabularies: seconds per token over those of the members alone."""
    if _one_vocabulary(members):
        return
    packs = {"alone": [Pack([member], chat_template=False, max_tokens=tokens) for member in members]}
    pack, even = (
        Pack(members, chat_template=False, max_tokens=tokens),
        {member.name: 1 / len(members) for member in members},
    )
    for mode in MODES:
        packs[mode] = [pack]
    times: dict[str, list[float]] = {}
    for _ in bar(range(repeat), "Modes"):
        for mode, those in packs.items():
            options: dict[str, Any] = {} if mode == "alone" else {"decoding": mode, "weighting": even}
            times.setdefault(mode, []).append(sum(_written(each.generate(text, **options)) for each in those))
    for mode in MODES:
        report.figures[f"modes.{mode}"] = ratio(times[mode], times["alone"])
    report.seconds |= {f"token_{mode}": median(values) for mode, values in times.items()}


def _written(generation: Generation) -> float:
    """Seconds per token after prefill and weighting."""
    timings = generation.timings
    return (timings["total"] - timings["prefill"] - timings["weighting"]) / generation.usage.completion_tokens


def _one_vocabulary(members: Sequence[Member]) -> bool:
    return all(member.vocabulary.akin(members[0].vocabulary) for member in members)


def _naive_step(members: Sequence[Member], models: Sequence[Any], ids: Tensor, prompt: int) -> int:
    """One token: every member reads everything again, the weights are solved again, and all is fused."""
    with torch.inference_mode():
        passes = [model(input_ids=ids.to(model.device), use_cache=False).logits[0] for model in models]
        logits = torch.stack([each[..., : members[0].vocabulary_size].float() for each in passes])
        weights = _naive_weights(logits[:, : prompt - 1], ids[0, 1:prompt])
        return int(fuse(logits[:, -1].log_softmax(-1), weights, "log").argmax())


def _naive_weights(logits: Tensor, targets: Tensor) -> list[float]:
    """Algorithm 1 to the letter: for each λ of each fold, all logits are fused and normalised."""

    def nll(scores: Tensor) -> float:
        return -float(scores.log_softmax(-1).gather(-1, targets.to(scores.device)[:, None]).mean())

    first, *others = sorted(range(len(logits)), key=lambda k: nll(logits[k]))
    fused, weights = logits[first], {first: 1.0}
    for k in others:
        share = min(
            (1 - step / STEPS for step in range(STEPS + 1)), key=lambda share: nll(torch.lerp(logits[k], fused, share))
        )
        fused = torch.lerp(logits[k], fused, share)
        weights = {**{member: weight * share for member, weight in weights.items()}, k: 1 - share}
    return [weights[k] for k in range(len(logits))]
