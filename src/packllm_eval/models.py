"""Which architectures a pack can run: tiny random models of every family, compared with transformers itself.

    python -m packllm_eval.models > docs/models.md      (or: make models)
    python -m packllm_eval.models mamba gemma2          (some families)

Every family of causal and of vision-language models in this version of transformers is shrunk to a few thousand
parameters, saved, loaded by Pack.load and used to write, in the ways of Checks. The expected text comes from
transformers: from `generate`, or from fresh passes over the whole text without a cache.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from tqdm import tqdm

from packllm import Pack
from packllm.errors import LoadError
from packllm_eval.tiny import byte_tokenizer, families, tiny_model

TOKENS = 8
PROMPTS = ("The quick brown fox jumps over the lazy dog.", "Insulin", "A hash index stores a 32-bit code")
CONTEXT = "The court shall order relief unless the debtor objects within 30 days of the notice. "  # over 64 tokens


@dataclass
class Checks:
    """The results of a family: whether the pack writes, token by token, the expected text.

    Attributes:
        alone: one member, one prompt: what `generate` of transformers writes.
        pairs: two members: what their fused distributions say, from fresh passes over the whole text.
        batches: the same of several prompts of different lengths together.
        drafts: the same, one member drafting tokens ahead.
        reuse: the same of a prompt that begins as an earlier one did.
    """

    alone: bool | None = None
    pairs: bool | None = None
    batches: bool | None = None
    drafts: bool | None = None
    reuse: bool | None = None


@dataclass
class Row:
    """A row of the table: a family, its kind, how it runs or why it does not, and the checks."""

    family: str
    kind: str
    note: str
    checks: Checks


def examine(family: str) -> Row:
    """Build, save, load and check a tiny model of a family."""
    try:
        models_ = [tiny_model(family, seed) for seed in range(2)]
    except Exception as error:
        return Row(family, "", f"not tried: no tiny model ({_first_line(error)})", Checks())
    kind = kind_of(models_[0].config)
    with tempfile.TemporaryDirectory() as folder:
        specs = []
        for name, model in zip("ab", models_, strict=True):
            model.save_pretrained(f"{folder}/{name}")
            byte_tokenizer().save_pretrained(f"{folder}/{name}")
            specs.append(f"{name}={folder}/{name}")
        try:
            pack = Pack.load(specs, weighting={"a": 0.6, "b": 0.4}, max_tokens=TOKENS)
        except LoadError as error:
            return Row(family, kind, f"refused: {_first_line(error).replace(folder, '')}", Checks())
        engine: Any = pack.models[0].engine
        try:
            checks = check(pack, models_[0])
        except Exception as error:
            return Row(family, kind, f"fails: {type(error).__name__}: {_first_line(error)}", Checks())
    if checks is None:
        return Row(family, kind, "loads; its tiny model writes the same whatever it reads", Checks())
    note = how(engine)
    if checks.alone and not checks.pairs:
        by_itself = [written(pack, prompt, (1.0, 0.0)) for prompt in PROMPTS]
        if by_itself != [generated(pack, models_[0], prompt) for prompt in PROMPTS]:
            note = "`generate` of transformers differs from fresh passes of the same model"
    return Row(family, kind, note, checks)


def check(pack: Pack, model: Any) -> Checks | None:
    """Let a pack of two members write, in every way.

    Args:
        pack: with fixed weights.
        model: its first member's transformers model.

    Returns:
        None if it writes the same text for every prompt, so that the checks prove nothing.
    """
    fused = [written(pack, prompt) for prompt in PROMPTS]
    if len(set(fused)) < len(PROMPTS):
        return None
    expected = written(pack, CONTEXT + PROMPTS[0])
    alone = Pack(pack.members[:1], max_tokens=TOKENS)

    def texts(prompts: Sequence[str], **options: Any) -> list[str]:
        return [answer.text for answer in pack.generate_batch(prompts, **options)]

    pack.generate(CONTEXT)
    return Checks(
        alone=[alone.generate(prompt).text for prompt in PROMPTS] == [generated(pack, model, p) for p in PROMPTS],
        pairs=[pack.generate(prompt, draft_tokens=1).text for prompt in PROMPTS] == fused,
        batches=texts(PROMPTS, draft_tokens=1) == fused,
        drafts=texts(PROMPTS, draft_tokens=4) == fused
        and [pack.generate(prompt, draft_tokens=4).text for prompt in PROMPTS] == fused,
        reuse=pack.generate(CONTEXT + PROMPTS[0]).text == expected,
    )


def written(pack: Pack, prompt: str, weights: Sequence[float] = (0.6, 0.4)) -> str:
    """The text that a pack should write with these weights: every member reads the whole text again for each token."""
    ids = pack.tokenize(prompt)
    start = len(ids)
    while len(ids) < start + TOKENS:
        parts = []
        for member in pack.models:
            with torch.inference_mode():
                logits = member.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            parts.append(logits[: member.vocabulary_size].float().softmax(-1))
        token = int((weights[0] * parts[0] + weights[1] * parts[1]).argmax())
        if token in pack.members[0].end_ids:
            break
        ids.append(token)
    return _text(pack, ids[start:])


def generated(pack: Pack, model: Any, prompt: str) -> str:
    """The text that transformers' `generate` writes."""
    ids = torch.tensor([pack.tokenize(prompt)])
    ends = sorted(pack.members[0].end_ids)
    out = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=TOKENS,
        eos_token_id=ends,
        pad_token_id=ends[0],
        forced_eos_token_id=None,  # some configurations set it
    )
    return _text(pack, [token for token in out[0, ids.shape[1] :].tolist() if token not in ends])


def _text(pack: Pack, ids: Sequence[int]) -> str:
    return b"".join(map(pack.members[0].vocabulary.text_bytes, ids)).decode(errors="replace")


def kind_of(config: Any) -> str:
    """The kind of an architecture: dense, mixture of experts, sliding window, linear attention, recurrent, ..."""
    from transformers import DynamicCache

    text = config.get_text_config(decoder=True)
    words = []
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if any("vision" in name or "audio" in name for name in getattr(config, "sub_configs", {})):
        words.append("vision-language")
    try:
        layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    except Exception:
        layers = set()
    linear = {name for name in layers if name.startswith("LinearAttention")}
    if linear:
        words.append("recurrent" if linear == layers == {"LinearAttentionLayer"} else "linear attention")
    if any("Sliding" in name for name in layers) or getattr(text, "window_size", None):
        words.append("sliding window")
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        words.append("mixture of experts")
    return ", ".join(words) or "dense"


def how(engine: Any) -> str:
    """How an architecture is run, in words; "" if it supports every shortcut."""
    words = []
    if engine.architecture.carrier is None:
        words.append("read again at every token")
    elif not engine.architecture.blocks:
        words.append("one token a pass after the prompt")
    if not engine.packs:
        words.append("sequence by sequence")
    if not engine.rewinds:
        words.append("no drafts")
    return "; ".join(words)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown page."""
    import transformers

    names = [field.name for field in fields(Checks)]
    tried = [row for row in rows if row.kind]
    right = [row for row in tried if all(vars(row.checks).values())]
    wrong = [row for row in tried if False in vars(row.checks).values() or row.note.startswith("fails")]
    refused = [row for row in tried if row.note.startswith("refused")]
    lines = [
        "# Models",
        "",
        f"Made by `make models` with transformers {transformers.__version__}: tiny random models of every family, "
        "saved, loaded and asked to write greedily.",
        f"Of {len(tried)} families {len(right)} write what they should in every way, {len(refused)} are refused at "
        f"load, {len(wrong)} differ somewhere.",
        "",
        *(f"- **{name}**: {text}" for name, text in _told().items()),
        "",
        f"| family | kind | {' | '.join(names)} | how it is run, or why not |",
        f"|---|---|{'---|' * len(names)}---|",
    ]
    for row in tried:
        marks = [{True: "yes", False: "**no**", None: ""}[getattr(row.checks, name)] for name in names]
        lines.append(f"| {row.family} | {row.kind} | {' | '.join(marks)} | {row.note.replace('|', ' ')} |")
    left = [row for row in rows if not row.kind]
    if left:
        lines += ["", f"Not tried, as no tiny model of them could be made: {', '.join(row.family for row in left)}."]
    return "\n".join(lines) + "\n"


def _told() -> dict[str, str]:
    """The description of each check, from the docstring of Checks."""
    lines = (Checks.__doc__ or "").split("Attributes:")[1].strip().splitlines()
    return dict(line.strip().split(": ", 1) for line in lines)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(names: Sequence[str] | None = None, show: Callable[..., Any] = tqdm) -> Iterator[Row]:
    """Examine families; all if no name is given."""
    for family in show(names or list(families()), unit="family", disable=None):
        yield examine(family)


def main() -> None:
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("packllm").setLevel(logging.ERROR)
    sys.stdout.write(table(list(run(sys.argv[1:]))))


if __name__ == "__main__":
    main()
