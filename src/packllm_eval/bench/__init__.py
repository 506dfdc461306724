"""packllm bench: the cost of packing on this machine, against its targets.

The two sides of a ratio are measured alternately within each repeat, so that a slower machine
slows both. A figure is the median of the repeats.
"""

from __future__ import annotations

from collections.abc import Sequence

from packllm.errors import OptionError
from packllm_eval.bench import company, figures, moving, serving, speed
from packllm_eval.bench.report import Report, show
from packllm_eval.bench.subjects import build, machine, text_of

__all__ = ["Report", "run", "show"]

MEMORY_TOKENS = 4096
DECODE_PROMPT, DECODE_TOKENS = 64, 48
CONTEXT_TOKENS = 2000
LONG_TOKENS = 3000
CROWD_TOKENS = 24
GROUPS = (
    "weighting",
    "memory",
    "decoding",
    "speculation",
    "prefix",
    "batches",
    "naive",
    "moving",
    "modes",
    "company",
    "beside",
    "passes",
    "growth",
    "threads",
    "serve",
    "start",
)
QUICK_TOKENS = 48


def run(
    models: Sequence[str] | None, *, tokens: int, members: int, repeat: int, quick: bool, only: Sequence[str] = ()
) -> Report:
    """Measure the figures.

    Args:
        models: specs for Pack.load; None: the starter pack, or random members if it is not installed.
        tokens: length of the weighted prompt.
        members: number of members.
        repeat: repeats of each measurement.
        quick: a few tokens and one repeat, only to test that everything runs.
        only: groups to measure, of GROUPS; all if empty.

    Raises:
        OptionError: a group that does not exist.
    """
    if unknown := [name for name in only if name not in GROUPS]:
        raise OptionError(f"only={unknown[0]!r} is unknown; valid: {', '.join(GROUPS)}")
    pack, notes = build(models, members, quick)
    for member in pack:
        member.end_ids = frozenset()  # every run decodes the same number of tokens
    room = min([member.context_window or MEMORY_TOKENS for member in pack]) - 1
    if quick:
        tokens, repeat = QUICK_TOKENS, 1
    tokens = min(tokens, room)
    memory_tokens = min(room, 2 * QUICK_TOKENS if quick else MEMORY_TOKENS)
    prompt_tokens = min(room // 2, 16 if quick else DECODE_PROMPT)
    new_tokens = min(room // 2, 4 if quick else DECODE_TOKENS)
    setting = {
        "members": [member.name for member in pack],
        "dtype": sorted({str(member.model.dtype).removeprefix("torch.") for member in pack}),
        "device": sorted({str(member.model.device) for member in pack}),
        "vocabulary": sorted({member.vocabulary_size for member in pack}),
        "parameters": [member.model.num_parameters() for member in pack],
        "tokens": tokens,
        "memory_tokens": memory_tokens,
        "decode_prompt": prompt_tokens,
        "decode_tokens": new_tokens,
        "repeat": repeat,
        "quick": quick,
    }
    report = Report(machine(), setting, notes=notes)
    long = min(room - 64, 2 * QUICK_TOKENS if quick else CONTEXT_TOKENS)
    wall = min(room - 64, 2 * QUICK_TOKENS if quick else LONG_TOKENS)
    naive_prompt, naive_tokens, samples = (16, 4, 2) if quick else (min(room // 2, 256), min(room // 2, 64), 4)
    groups = {
        "weighting": lambda: figures.weighting(report, pack, text_of(pack, tokens), repeat),
        "memory": lambda: figures.memory(report, pack, text_of(pack, memory_tokens)),
        "decoding": lambda: figures.decoding(report, pack, text_of(pack, prompt_tokens), new_tokens, repeat),
        "speculation": lambda: speed.speculation(report, pack, text_of(pack, prompt_tokens), new_tokens, repeat),
        "prefix": lambda: speed.prefix(report, pack, text_of(pack, long), 1 if quick else min(repeat, 3)),
        "batches": lambda: speed.batches(report, pack, text_of(pack, prompt_tokens), new_tokens, repeat),
        "naive": lambda: speed.naive(report, pack, text_of(pack, naive_prompt), naive_tokens, samples),
        "moving": lambda: moving.moving(
            report, pack, text_of(pack, prompt_tokens), new_tokens, repeat, 4 if quick else moving.ROWS
        ),
        "modes": lambda: speed.modes(report, pack, text_of(pack, prompt_tokens), new_tokens, repeat),
        "company": lambda: company.company(report, pack, text_of(pack, prompt_tokens), new_tokens, repeat),
        "beside": lambda: company.beside(report, pack, text_of(pack, wall), new_tokens, repeat),
        "passes": lambda: company.passes(report, 4 if quick else CROWD_TOKENS),
        "growth": lambda: company.growth(report, pack, 128 if quick else room, new_tokens, 1 if quick else repeat),
        "threads": lambda: company.threads(report, new_tokens, repeat, quick),
        "serve": lambda: serving.serving(report, prompt_tokens, new_tokens, repeat, skip=quick),
        "start": lambda: figures.start(report, repeat, skip=quick),
    }
    for name in only or GROUPS:
        groups[name]()
    return report
