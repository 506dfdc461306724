"""A prior from a user's own answers: what a member knows of passages is not how well it answers (METHODS §3)."""

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
"""Rows from which on a held-out gain can be told from chance, if it is large."""

FOLDS = 10
TOGETHER = 8
"""Rows that are read together."""

ROUNDS = 2000
"""Samples of a bootstrap interval."""

FORMAT = "packllm prior 1"


class Members(Protocol):
    """What calibration asks of a pack."""

    options: Options

    @property
    def models(self) -> tuple[Member, ...]: ...

    @property
    def has_chat_template(self) -> bool: ...


@dataclass(frozen=True)
class Worth:
    """What a calibration found.

    Attributes:
        rows: different rows that it saw.
        units: words or tokens of their answers.
        unit: which of both.
        tokens: ids that were read, of all members.
        passages: each member's `em` weight on the prompts, in the pack's order.
        answers: the same on the answers: the prior.
        plain, calibrated: held-out NLL of the answers, nats per unit, under `em` of each prompt without and with a
            prior that the other rows gave; None for one row.
        gain: their difference with its 95 % bootstrap interval over rows; below 0 the prior helps.
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
        """Whether the prior is of use, in words."""
        if self.gain is None or self.rows < LEAST:
            return f"Too few different rows ({self.rows}) to say whether the prior helps; give {LEAST} or more."
        _, low, high = self.gain
        if high < 0:
            return "The prior helps: on rows that it has not seen, answers are likelier with it."
        if low > 0:
            return "No gain: on rows that it has not seen, answers are less likely with the prior. Leave it out."
        return "No gain that can be told from chance: the interval holds 0. Leave the prior out, or give more rows."

    def told(self, names: Sequence[str]) -> str:
        """All of it in lines, for members of these names."""
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
    """{member name: weight}, for the option `prior`; refused by packs of other members.

    Attributes:
        fingerprints: {member name: hash of its content}.
        worth: what the calibration found.
    """

    def __init__(self, weights: Mapping[str, float], fingerprints: Mapping[str, str], worth: Worth) -> None:
        super().__init__(weights)
        self.fingerprints, self.worth = dict(fingerprints), worth

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe, as save() writes it."""
        found = [{"name": n, "fingerprint": self.fingerprints[n], "weight": weight} for n, weight in self.items()]
        return {"format": FORMAT, "members": found, "worth": {**asdict(self.worth), "verdict": self.worth.verdict}}

    def save(self, path: str | Path) -> None:
        """Write what the option `prior` reads."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def prior_of(given: str | Mapping[str, float], members: Sequence[Author]) -> dict[str, float]:
    """The prior of these members by their names, from a mapping or a file of Prior.save().

    Raises:
        WeightsError: the file cannot be read, or it is of other members.
    """
    if isinstance(given, str):
        named = _read_prior(given)
    elif isinstance(given, Prior):
        named = [(given.fingerprints[name], weight) for name, weight in given.items()]
    else:
        return dict(given)
    left = {member.name: member.fingerprint for member in members}
    known, here = Counter(fingerprint for fingerprint, _ in named), Counter(left.values())
    if known != here:
        lost = next((m.name for m in members if here[m.fingerprint] > known[m.fingerprint]), None)
        which = f"it does not know member {lost!r}" if lost else "it is of more members"
        raise WeightsError(f"prior={shown(given)} is of another pack: {which}; calibrate this pack (packllm calibrate)")
    found = {}
    for fingerprint, weight in named:
        name = next(name for name, own in left.items() if own == fingerprint)
        del left[name]
        found[name] = weight
    return found


def _read_prior(path: str) -> list[tuple[str, float]]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, not {FORMAT!r}")
        return [(str(one["fingerprint"]), float(one["weight"])) for one in data["members"]]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise WeightsError(f"prior={path!r} is no file of packllm calibrate: {error}") from error


def calibrate(pack: Members, rows: Iterable[Mapping[str, Any]]) -> Prior:
    """What each member is worth on answers: `em` on the gold answers' probabilities, given question and context, over
    all rows together. Every member reads every row once.

    Args:
        pack: the members; its options say how prompts are put and scored.
        rows: {"question": text, "context": text or "passages": list of texts, "answer": text}, or {"messages": list of
            messages, "answer": text}. A row that comes twice counts once.

    Raises:
        DataError: no rows, or one that is none: without a question, without an answer, or with one of no token.
        ContextOverflowError: a row does not fit a member.
        MemberError: a member fails.
    """
    members = pack.models
    asked = [_row(row, at, pack.has_chat_template) for at, row in enumerate(rows, 1)]
    different = {json.dumps(row, default=repr, sort_keys=True): row for row in asked}.values()
    if not different:
        raise DataError("calibration needs rows of question, context and answer; there is none")
    texts = [[_encoded(member, prompt, answer, pack.options) for member in members] for prompt, answer in different]
    read: list[tuple[np.ndarray, np.ndarray]] = []
    words = False
    with tqdm(total=len(texts), desc="Reading rows", unit="row", disable=None, delay=SLOW, leave=False) as bar:
        for start in range(0, len(texts), TOGETHER):
            group = texts[start : start + TOGETHER]
            for row, given in zip(group, _given(members, group), strict=True):
                prompts, answers = [prompt for prompt, _ in row], [answer for _, answer in row]
                scores = [g[[at - 1 for at in p.positions]] for p, g in zip(prompts, given, strict=True)]
                said = [g[len(p.ids) - 1 :] for p, g in zip(prompts, given, strict=True)]
                answered = in_common(members, answers, said)
                words |= answered.tokens is None
                read.append((in_common(members, prompts, scores).matrix.numpy(), answered.matrix.numpy()))
                bar.update()
    if not sum(answer.shape[1] for _, answer in read):
        raise DataError("no answer has a word that all members could score; give longer answers")
    tokens = sum(len(prompt.ids) + len(answer.ids) - 1 for row in texts for prompt, answer in row)
    worth = _worth(read, "word" if words else "token", tokens, pack.options.alpha)
    weights = {member.name: weight for member, weight in zip(members, worth.answers, strict=True)}
    return Prior(weights, {member.name: member.fingerprint for member in members}, worth)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file, gzipped or not.

    Raises:
        DataError: it cannot be read, or a line is no JSON object.
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
    """Prompt and answer of a row."""
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
    # Text that is continued needs a place for the answer.
    return (prompt, answer) if has_template else (f"{prompt}\n\nAnswer:", f" {answer}")


def _passages(row: Mapping[str, Any], at: int) -> list[str]:
    context = row.get("passages", row.get("context"))
    passages = [] if context is None else [context] if isinstance(context, str) else context
    if not isinstance(passages, list | tuple) or not all(isinstance(passage, str) for passage in passages):
        raise DataError(f"row {at}: context={shown(context)} must be text, and passages a list of texts")
    return [passage for passage in passages if passage.strip()]


def _encoded(member: Member, prompt: Prompt, answer: str, options: Options) -> tuple[Encoded, Encoded]:
    """A prompt and the answer that continues it. An answer that the tokenizer rewrites is one unit."""
    window = member.context_window
    try:
        put = member.encoder.encode(prompt, options.score_on, (), None, options.chat_template_kwargs, window=window)
    except TooLong as error:
        raise ContextOverflowError(member.name, window or 0, error.tokens, 1) from None
    ids = member.encoder.continuation(answer)
    if not ids:
        raise DataError(f"the answer {shown(answer)} comes to no token of member {member.name!r}")
    if window is not None and len(put.ids) + len(ids) > window:
        raise ContextOverflowError(member.name, window, len(put.ids), len(ids))
    places = offsets(answer, [member.vocabulary.text_bytes(i) for i in ids])
    starts, ends = places or ([0] * len(ids), [len(answer)] * len(ids))
    return put, Encoded(ids, answer, list(range(len(ids))), starts, ends)


def _given(members: Sequence[Member], rows: Sequence[list[tuple[Encoded, Encoded]]]) -> Iterator[list[Tensor]]:
    """What each member gives all ids of each row after the first: float64 (n - 1,), K of them a row."""
    reads = []
    for row in rows:
        for member, (prompt, answer) in zip(members, row, strict=True):
            ids = [*prompt.ids, *answer.ids]
            reads.append(Read(member.open(), ids[:-1], ids[1:]))
    try:
        found = read_together(reads)
    finally:
        for read in reads:
            read.sequence.close()
    for at in range(0, len(found), len(members)):
        part: list[Tensor] = []
        for member, given in zip(members, found[at : at + len(members)], strict=True):
            if isinstance(given, Exception):
                raise member.failed(given)
            part.append(given)
        yield part


def _worth(read: Sequence[tuple[np.ndarray, np.ndarray]], unit: str, tokens: int, alpha: float) -> Worth:
    size = len(read[0][0])
    uniform = np.full(size, 1.0 / size)

    def worth(matrices: Iterable[np.ndarray]) -> np.ndarray:
        return np.array(maximise(np.concatenate(list(matrices), axis=1), uniform, alpha)[0])

    found = Worth(
        rows=len(read),
        units=sum(answer.shape[1] for _, answer in read),
        unit=unit,
        tokens=tokens,
        passages=tuple(worth(prompt for prompt, _ in read).tolist()),
        answers=tuple(worth(answer for _, answer in read).tolist()),
    )
    if len(read) == 1:
        return found
    nats = np.zeros((2, len(read)))
    for fold in range(min(FOLDS, len(read))):
        pi = worth(answer for at, (_, answer) in enumerate(read) if at % FOLDS != fold)
        for at in range(fold, len(read), FOLDS):
            prompt, answer = read[at]
            nats[0, at] = _nll(maximise(prompt, uniform, alpha)[0], answer)
            nats[1, at] = _nll(maximise(prompt, pi, "prompt")[0], answer)
    units = np.array([answer.shape[1] for _, answer in read])
    plain, calibrated = (nats.sum(1) / units.sum()).tolist()
    drawn = np.random.default_rng(0).integers(0, len(read), (ROUNDS, len(read)))
    differences = (nats[1] - nats[0])[drawn].sum(1) / np.maximum(units[drawn].sum(1), 1)
    low, high = np.quantile(differences, [0.025, 0.975]).tolist()
    return Worth(**{**asdict(found), "plain": plain, "calibrated": calibrated, "gain": (calibrated - plain, low, high)})


def _nll(weights: Sequence[float], logprobs: np.ndarray) -> float:
    """Of what occurred, in nats, under the mixture."""
    scale = torch.tensor(weights, dtype=torch.float64).log()[:, None]
    return -float((torch.from_numpy(logprobs) + scale).logsumexp(0).sum())
