"""Calibration: a prior from answers. A member that predicts passages well need not answer well (METHODS §3)."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from packllm.align.words import offsets
from packllm.chat.messages import Prompt, check, with_context
from packllm.chat.prompt import Encoded, TooLong
from packllm.engines.base import Read, read_together
from packllm.engines.member import Author, Member
from packllm.errors import ContextOverflowError, DataError, PromptError, WeightsError, shown
from packllm.options import Options
from packllm.progress import SLOW
from packllm.weights.common import in_common
from packllm.weights.em import maximise

LEAST = 10
"""Fewest rows from which a large held-out gain can be significant."""

FOLDS = 10
TOGETHER = 8
"""Rows that are read in one pass."""

ROUNDS = 2000
"""Bootstrap samples of a confidence interval."""

FORMAT = "packllm prior 1"


class Members(Protocol):
    """The part of a pack that calibration uses."""

    options: Options

    @property
    def models(self) -> tuple[Member, ...]: ...

    @property
    def has_chat_template(self) -> bool: ...


@dataclass(frozen=True)
class Worth:
    """The result of a calibration.

    Attributes:
        rows: number of different rows.
        units: number of words or tokens in their answers.
        unit: which of the two.
        tokens: number of ids read, of all members together.
        passages: each member's `em` weight on the prompts, in the pack's order.
        answers: each member's `em` weight on the answers: the prior.
        plain, calibrated: held-out NLL of the answers in nats per unit, under each prompt's `em` weights, without and
            with a prior from the other rows; None if there is only one row.
        gain: calibrated minus plain, with its 95 % bootstrap interval over rows; negative if the prior helps.
    """

    rows: int
    units: int
    unit: str
    tokens: int
    passages: tuple[float, ...]
    answers: tuple[float, ...]
    plain: float | None = None
    calibrated: float | None = None
    gain: tuple[float, float, float] | None = None

    @property
    def verdict(self) -> str:
        """Whether the prior helps, in words."""
        if self.gain is None or self.rows < LEAST:
            return f"Too few different rows ({self.rows}) to say whether the prior helps; give {LEAST} or more."
        _, low, high = self.gain
        if high < 0:
            return "The prior helps: on rows that it has not seen, answers are likelier with it."
        if low > 0:
            return "No gain: on rows that it has not seen, answers are less likely with the prior. Leave it out."
        return "No gain beyond chance: the interval contains 0. Leave the prior out, or give more rows."

    def summary(self, names: Sequence[str]) -> str:
        """A report in lines of text, for members with these names."""
        width = max(6, *map(len, names))
        lines = [f"{'member':{width}}  on passages  on answers"]
        for name, passages, answers in zip(names, self.passages, self.answers, strict=True):
            lines.append(f"{name:{width}}  {passages:11.3f}  {answers:10.3f}")
        lines += ["", f"{self.rows} rows, {self.units} {self.unit}s of answers."]
        if self.plain is not None and self.calibrated is not None and self.gain is not None:
            difference, low, high = self.gain
            lines.append(
                f"Held out, nats a {self.unit} of the answer: em {self.plain:.4f}, with the prior "
                f"{self.calibrated:.4f}, difference {difference:+.4f} [{low:+.4f}, {high:+.4f}]."
            )
        return "\n".join([*lines, self.verdict])


class Prior(dict[str, float]):
    """{member name: weight}, for the option `prior`; packs of other members refuse it.

    Attributes:
        fingerprints: {member name: hash of its weights}.
        worth: the result of the calibration.
    """

    def __init__(self, weights: Mapping[str, float], fingerprints: Mapping[str, str], worth: Worth) -> None:
        super().__init__(weights)
        self.fingerprints, self.worth = dict(fingerprints), worth

    def as_dict(self) -> dict[str, Any]:
        """The JSON-safe content that save() writes."""
        members = [{"name": n, "fingerprint": self.fingerprints[n], "weight": weight} for n, weight in self.items()]
        return {"format": FORMAT, "members": members, "worth": {**asdict(self.worth), "verdict": self.worth.verdict}}

    def save(self, path: str | Path) -> None:
        """Write the prior to a file for the option `prior`."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def prior_of(prior: str | Mapping[str, float], members: Sequence[Author]) -> dict[str, float]:
    """The prior of these members by name, from a mapping or a file of Prior.save().

    Raises:
        WeightsError: the file cannot be read, or belongs to other members.
    """
    if isinstance(prior, str):
        fingerprinted = _read_prior(prior)
    elif isinstance(prior, Prior):
        fingerprinted = [(prior.fingerprints[name], weight) for name, weight in prior.items()]
    else:
        return dict(prior)
    unmatched = {member.name: member.fingerprint for member in members}
    counts, pack_counts = Counter(fingerprint for fingerprint, _ in fingerprinted), Counter(unmatched.values())
    if counts != pack_counts:
        missing = next((m.name for m in members if pack_counts[m.fingerprint] > counts[m.fingerprint]), None)
        which = f"it does not know member {missing!r}" if missing else "it is of more members"
        raise WeightsError(f"prior={shown(prior)} is of another pack: {which}; calibrate this pack (packllm calibrate)")
    result = {}
    for fingerprint, weight in fingerprinted:
        name = next(name for name, other in unmatched.items() if other == fingerprint)
        del unmatched[name]
        result[name] = weight
    return result


def _read_prior(path: str) -> list[tuple[str, float]]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        return [(str(one["fingerprint"]), float(one["weight"])) for one in data["members"]]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise WeightsError(f"prior={path!r} is no file of packllm calibrate: {error}") from error


def calibrate(pack: Members, rows: Iterable[Mapping[str, Any]]) -> Prior:
    """Compute a prior: the members' `em` weights on gold answers, given question and context, over all rows together.
    Every member reads every row once.

    Args:
        pack: the members; its options say how prompts are formatted and scored.
        rows: {"question": text, "context": text or "passages": list of texts, "answer": text}, or {"messages": list of
            messages, "answer": text}. Equal rows count once.

    Raises:
        DataError: there are no rows, or a row has no question, no answer, or an answer without tokens.
        ContextOverflowError: a row is too long for a member.
        MemberError: a member fails.
    """
    members = pack.models
    checked = [_row(row, at, pack.has_chat_template) for at, row in enumerate(rows, 1)]
    different = {json.dumps(row, default=repr, sort_keys=True): row for row in checked}.values()
    if not different:
        raise DataError("calibration needs rows of question, context and answer; there is none")
    texts = [[_encoded(member, prompt, answer, pack.options) for member in members] for prompt, answer in different]
    scored: list[tuple[np.ndarray, np.ndarray]] = []
    words = False
    with tqdm(total=len(texts), desc="Reading rows", unit="row", disable=None, delay=SLOW, leave=False) as bar:
        for start in range(0, len(texts), TOGETHER):
            group = texts[start : start + TOGETHER]
            for row, logprobs in zip(group, _row_logprobs(members, group), strict=True):
                prompts, answers = [prompt for prompt, _ in row], [answer for _, answer in row]
                scores = [g[[at - 1 for at in p.positions]] for p, g in zip(prompts, logprobs, strict=True)]
                answer_scores = [g[len(p.ids) - 1 :] for p, g in zip(prompts, logprobs, strict=True)]
                answer_words = in_common(members, answers, answer_scores)
                words |= answer_words.tokens is None
                scored.append((in_common(members, prompts, scores).matrix.numpy(), answer_words.matrix.numpy()))
                bar.update()
    if not sum(answer.shape[1] for _, answer in scored):
        raise DataError("no answer has a word that all members could score; give longer answers")
    tokens = sum(len(prompt.ids) + len(answer.ids) - 1 for row in texts for prompt, answer in row)
    worth = _worth(scored, "word" if words else "token", tokens, pack.options.alpha)
    weights = {member.name: weight for member, weight in zip(members, worth.answers, strict=True)}
    return Prior(weights, {member.name: member.fingerprint for member in members}, worth)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, plain or gzipped.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is {shown(row)}; a row is an object with question and answer")
            rows.append(row)
    return rows


def _row(row: Mapping[str, Any], at: int, has_template: bool) -> tuple[Prompt, str]:
    """The prompt and the answer of a row."""
    if not isinstance(row, Mapping):
        raise DataError(f"row {at} is {shown(row)}; a row is a mapping with question, context and answer")
    answer, question = row.get("answer"), row.get("question")
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"row {at} has no answer: answer={shown(answer)}; give the gold answer as text")
    try:
        if "messages" in row:
            return check(row["messages"], True), answer
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"row {at} has no question: question={shown(question)}; give it as text, or messages")
        prompt = check(with_context(question, _passages(row, at)), has_template)
    except PromptError as error:
        raise DataError(f"row {at}: {error}") from error
    # A prompt without a chat template needs a mark where the answer begins.
    return (prompt, answer) if has_template else (f"{prompt}\n\nAnswer:", f" {answer}")


def _passages(row: Mapping[str, Any], at: int) -> list[str]:
    context = row.get("passages", row.get("context"))
    passages = [] if context is None else [context] if isinstance(context, str) else context
    if not isinstance(passages, list | tuple) or not all(isinstance(passage, str) for passage in passages):
        raise DataError(f"row {at}: context={shown(context)} must be text, and passages a list of texts")
    return [passage for passage in passages if passage.strip()]


def _encoded(member: Member, prompt: Prompt, answer: str, options: Options) -> tuple[Encoded, Encoded]:
    """A prompt, and the answer that continues it. An answer that the tokenizer changes counts as one unit."""
    window = member.context_window
    try:
        encoded = member.encoder.encode(prompt, options.score_on, (), None, options.chat_template_kwargs, window=window)
    except TooLong as error:
        raise ContextOverflowError(member.name, window or 0, error.tokens, 1) from None
    ids = member.encoder.continuation(answer)
    if not ids:
        raise DataError(f"the answer {shown(answer)} has no tokens for member {member.name!r}; give other text")
    if window is not None and len(encoded.ids) + len(ids) > window:
        raise ContextOverflowError(member.name, window, len(encoded.ids), len(ids))
    places = offsets(answer, [member.vocabulary.text_bytes(i) for i in ids])
    starts, ends = places or ([0] * len(ids), [len(answer)] * len(ids))
    return encoded, Encoded(ids, answer, list(range(len(ids))), starts, ends)


def _row_logprobs(members: Sequence[Member], rows: Sequence[list[tuple[Encoded, Encoded]]]) -> Iterator[list[Tensor]]:
    """Each member's log-probabilities of a row's ids, except the first: K tensors float64 (n - 1,) a row; NaN where the
    prompt is not scored."""
    reads = []
    for row in rows:
        for member, (prompt, answer) in zip(members, row, strict=True):
            ids, scored = [*prompt.ids, *answer.ids], {*prompt.positions}
            targets = [i if at in scored or at >= len(prompt.ids) else -1 for at, i in enumerate(ids)]
            reads.append(Read(member.open(), ids[:-1], targets[1:]))
    try:
        answers = read_together(reads)
    finally:
        for read in reads:
            read.sequence.close()
    for at in range(0, len(answers), len(members)):
        part: list[Tensor] = []
        for member, scores in zip(members, answers[at : at + len(members)], strict=True):
            if isinstance(scores, Exception):
                raise member.failed(scores)
            part.append(scores)
        yield part


def _worth(rows: Sequence[tuple[np.ndarray, np.ndarray]], unit: str, tokens: int, alpha: float) -> Worth:
    size = len(rows[0][0])
    uniform = np.full(size, 1.0 / size)

    def worth(matrices: Iterable[np.ndarray]) -> np.ndarray:
        return np.array(maximise(np.concatenate(list(matrices), axis=1), uniform, alpha)[0])

    result = Worth(
        rows=len(rows),
        units=sum(answer.shape[1] for _, answer in rows),
        unit=unit,
        tokens=tokens,
        passages=tuple(worth(prompt for prompt, _ in rows).tolist()),
        answers=tuple(worth(answer for _, answer in rows).tolist()),
    )
    if len(rows) == 1:
        return result
    nats = np.zeros((2, len(rows)))
    for fold in range(min(FOLDS, len(rows))):
        pi = worth(answer for at, (_, answer) in enumerate(rows) if at % FOLDS != fold)
        for at in range(fold, len(rows), FOLDS):
            prompt, answer = rows[at]
            nats[0, at] = _nll(maximise(prompt, uniform, alpha)[0], answer)
            nats[1, at] = _nll(maximise(prompt, pi, "prompt")[0], answer)
    units = np.array([answer.shape[1] for _, answer in rows])
    plain, calibrated = (nats.sum(1) / units.sum()).tolist()
    samples = np.random.default_rng(0).integers(0, len(rows), (ROUNDS, len(rows)))
    differences = (nats[1] - nats[0])[samples].sum(1) / np.maximum(units[samples].sum(1), 1)
    low, high = np.quantile(differences, [0.025, 0.975]).tolist()
    return Worth(
        **{**asdict(result), "plain": plain, "calibrated": calibrated, "gain": (calibrated - plain, low, high)}
    )


def _nll(weights: Sequence[float], logprobs: np.ndarray) -> float:
    """NLL in nats of what was observed, under the mixture."""
    scale = torch.tensor(weights, dtype=torch.float64).log()[:, None]
    return -float((torch.from_numpy(logprobs) + scale).logsumexp(0).sum())
