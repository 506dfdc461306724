"""Other ways to use passages, on the gold answers: each passage in a prompt of its own, mixed (REPLUG with members),
and all passages against none (context-aware contrast)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from packllm.chat.messages import check, with_context
from packllm.chat.prompt import Encoded, Encoder
from packllm.engines.member import Member
from packllm.weights.adaptive import Adaptive
from packllm_eval.evidence import reading
from packllm_eval.evidence.answers import number
from packllm_eval.evidence.methods import dropped, em, together
from packllm_eval.evidence.reading import Alone, Row, Scores, told
from packllm_eval.evidence.show import table, versus

CONTRASTS = (0.0, 0.1, 0.25, 0.5, 1.0)
"""a in p ∝ p(with passages)^(1 + a) / p(without)^a."""

AGAINST = ("one prompt, em", "the likeliest passage alone")

TEMPERATURES = (1.0, 4.0)
"""Nats of a question's likelihood after its passages that make their weights differ by a factor of e."""


def questions(
    data: Path, out: Path, names: Sequence[str], limit: int | None, count: int | None
) -> list[tuple[Row, list[Scores]]]:
    """The test questions with what all members gave them, the first `count` of each corpus."""
    rows = reading.load(reading.rows_of(data, limit), "rag", out, names)
    test = [(row, scores) for row, scores in rows if row.use == "test" and (count is None or number(row) < count)]
    return sorted(test, key=lambda pair: (number(pair[0]), pair[0].corpus))


def apart(content: str) -> tuple[str, list[str]]:
    """The question and the passages that with_context() put together."""
    head, middle = with_context("\0", ["\1"]).replace("\0", "\1").split("\1")[:2]
    context, _, question = content.removeprefix(head).rpartition(middle)
    return question, context.split("\n\n")


def read(members: Sequence[Member], data: Path, out: Path, device: str, limit: int | None, count: int | None) -> None:
    """Write passages-<question>.npz for every question that has none yet."""
    names = [member.name for member in members]
    models: list[Alone] = []
    for row, scores in questions(data, out, names, limit, count):
        path = out / f"passages-{row.id}.npz"
        if path.exists():
            continue
        models = models or [Alone(member, device) for member in members]
        started = time.perf_counter()
        reading.save(path, _arrays(models, row, scores))
        told(f"{path.name}: {time.perf_counter() - started:.1f} s")


def _arrays(models: Sequence[Alone], row: Row, scores: Sequence[Scores]) -> dict[str, np.ndarray]:
    encoder = models[0].member.encoder
    question, passages = apart(row.prompt[0]["content"])
    answer = encoder.continuation(row.texts[0])
    told_one = [_encoded(encoder, with_context(question, [passage])) for passage in passages]
    everything, nothing = _encoded(encoder, row.prompt[0]["content"]), _encoded(encoder, question)
    weights = dropped(em(together(row, scores, ["one"] * len(models))[0]))
    found: dict[str, list[np.ndarray]] = {"long": [], "none": []}
    fused: dict[str, Tensor] = {}
    for k, model in enumerate(models):
        for at, encoded in enumerate(told_one):
            given = _logprobs(model, encoded, answer)
            places = [place - encoded.positions[0] for place in encoded.positions]
            chosen = _of(given, [*encoded.ids[encoded.positions[0] :], *answer])
            found.setdefault(f"prompt{at}", []).append(chosen[places])
            found.setdefault(f"answer{at}", []).append(chosen[-len(answer) :])
        for name, encoded in (("long", everything), ("none", nothing)):
            given = _logprobs(model, encoded, answer)[-len(answer) :]
            found[name].append(_of(given, answer))
            part = given.exp() * float(weights[k])
            fused[name] = fused[name] + part if name in fused else part
    with_, without = (fused[name].clamp_min(1e-30).log() for name in ("long", "none"))
    contrasts = [((1 + a) * with_ - a * without).log_softmax(-1) for a in CONTRASTS]
    arrays = {name: np.stack(values) for name, values in found.items()}
    arrays |= {f"spans{at}": np.array([e.starts, e.ends]).T for at, e in enumerate(told_one)}
    arrays |= {f"question{at}": np.array(e.text.rfind(question)) for at, e in enumerate(told_one)}
    arrays["weights"] = weights
    arrays["contrast"] = np.stack([_of(given, answer) for given in contrasts])
    arrays["likeliest"] = np.stack([given.argmax(-1).cpu().numpy() == np.array(answer) for given in contrasts])
    arrays["right"] = np.array([row.texts[0][:60] in passage for passage in passages])
    return arrays


def _encoded(encoder: Encoder, content: str) -> Encoded:
    return encoder.encode(check([{"role": "user", "content": content}], False))


def _logprobs(model: Alone, encoded: Encoded, answer: Sequence[int]) -> Tensor:
    """(n, V) before each token from the first scored one of a prompt to the end of the answer."""
    ids = torch.tensor([[*encoded.ids, *answer]], device=model.device)
    with torch.inference_mode():
        logits = model.model(input_ids=ids, use_cache=False).logits[0, encoded.positions[0] - 1 : -1]
        return model.real(logits).log_softmax(-1)


def _of(given: Tensor, ids: Sequence[int]) -> np.ndarray:
    return given.gather(-1, torch.tensor(ids, device=given.device)[:, None])[:, 0].cpu().numpy().astype(np.float64)


def tables(data: Path, out: Path, names: Sequence[str], limit: int | None) -> list[str]:
    """NLL of the gold answers under each way, of the questions that there are arrays for."""
    nats: dict[str, list[float]] = {}
    hits: list[np.ndarray] = []
    sizes, corpora, best_is_right = [], [], []
    for row, _ in questions(data, out, names, limit, None):
        path = out / f"passages-{row.id}.npz"
        if not path.exists():
            continue
        with np.load(path) as file:
            arrays = dict(file)
        for label, value in ways(arrays).items():
            nats.setdefault(label, []).append(value)
        hits.append(arrays["likeliest"].sum(1))
        sizes.append(arrays["long"].shape[1])
        corpora.append(row.corpus)
        best_is_right.append(bool(arrays["right"][np.argmax(relevances(arrays))]))
    if not nats:
        return []
    counted, found = np.array(sizes), {label: np.array(values) for label, values in nats.items()}
    places = {corpus: [at for at, one in enumerate(corpora) if one == corpus] for corpus in dict.fromkeys(corpora)}
    bases = [found[label] for label in AGAINST]
    lines: list[list[str]] = []
    for label, values in sorted(found.items(), key=lambda item: item[1].sum()):
        cells = [f"{values[at].sum() / counted[at].sum():.4f}" for at in places.values()]
        total = f"{values.sum() / counted.sum():.4f}"
        lines.append([label, *cells, total, *(versus(values, base, counted) for base in bases)])
    counts = ", ".join(f"{corpus} {len(at)}" for corpus, at in places.items())
    share = np.array(hits).sum(0) / counted.sum()
    likeliest = ", ".join(f"a = {a:g}: {value:.4f}" for a, value in zip(CONTRASTS, share, strict=True))
    rows = table(["way", *places, "nats/token", *(f"against {label}" for label in AGAINST)], lines)
    return [
        f"## Passages one by one, and contrast\n\n{len(sizes)} questions: {counts}. The passage after which the "
        f"question is likeliest is the right one in {np.mean(best_is_right):.1%}. Share of answer tokens that are the "
        f"likeliest, by contrast: {likeliest}.\n\n{rows}"
    ]


def relevances(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """log p of the question after each passage, under the `em` of its prompt."""
    found = []
    for at in range(len(arrays["right"])):
        prompt = arrays[f"prompt{at}"]
        asked = arrays[f"spans{at}"][:, 0] >= int(arrays[f"question{at}"])
        found.append(np.log(dropped(em(prompt)) @ np.exp(prompt[:, asked])).sum())
    return np.array(found)


def ways(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Nats of the gold answer under each way."""
    count, weights = len(arrays["right"]), arrays["weights"]
    rated, own = relevances(arrays), [dropped(em(arrays[f"prompt{at}"])) for at in range(count)]
    answers = [arrays[f"answer{at}"] for at in range(count)]
    one = [float(-np.log(w @ np.exp(a)).sum()) for w, a in zip(own, answers, strict=True)]
    right = np.flatnonzero(arrays["right"])
    found = {
        "one prompt, em": float(-np.log(weights @ np.exp(arrays["long"])).sum()),
        "one prompt, em + adapt": _adapted(weights, arrays["long"]),
        "no passage": float(-np.log(weights @ np.exp(arrays["none"])).sum()),
        "the likeliest passage alone": one[int(rated.argmax())],
        "the right passage alone (in hindsight)": one[int(right[0] if len(right) else rated.argmax())],
    }
    for label, temperature in [("alike", np.inf), *((f"by the question, τ = {t:g}", t) for t in TEMPERATURES)]:
        share = np.exp((rated - rated.max()) / temperature)
        both = np.concatenate([s * w for s, w in zip(share / share.sum(), own, strict=True)])
        found[f"mixture of passages, {label}"] = float(-np.log(both @ np.exp(np.concatenate(answers))).sum())
        found[f"mixture of passages, {label} + adapt"] = _adapted(both, np.concatenate(answers))
    found |= {f"contrast, a = {a:g}": float(-c.sum()) for a, c in zip(CONTRASTS, arrays["contrast"], strict=True) if a}
    return found


def _adapted(weights: np.ndarray, logprobs: np.ndarray) -> float:
    state, nats = Adaptive(weights), 0.0
    for given in np.exp(logprobs).T:
        nats -= float(np.log(state.weights() @ given))
        state.observe(given)
    return nats
