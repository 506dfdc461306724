"""packllm eval: the evaluation protocols on the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

if TYPE_CHECKING:
    from packllm.pack import Pack
    from packllm_eval.tables import Entry


class AuditFirst(typer.core.TyperGroup):
    """A command group in which `packllm eval FILE` means `packllm eval audit FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["audit", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=AuditFirst,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Compare the pack with its members and with rivals. FILE alone is audit FILE.\n\n"
    "[dim]Example:[/]\n\npackllm eval mycorpus.jsonl --models ./base --models ./base+./law",
)

Files = Annotated[
    list[Path],
    typer.Argument(
        help=".jsonl, .txt or .md files, gzipped or not, folders of them, or hub:NAME[:CONFIG[:SPLIT]].",
        show_default=False,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--models",
        "--model",
        "-m",
        metavar="SPEC",
        help="Members, as for ask; repeat it, or separate them by commas. Default: the starter pack.",
    ),
]
MethodNames = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        metavar="WEIGHTING[@MEMBERS][:NAME=VALUE,...]",
        help="What to compare, as in em, sim:tau=1, opt@base+law, dexperts@base+expert+anti, exhaustive or "
        "cbtm:fitted=FILE (see fit). Repeatable. Default: em, uniform, top1, sim with both tau, opt, exact and map, as "
        "far as they fit the pack.",
    ),
]
Average = Annotated[
    bool, typer.Option("--average", help="Also a member whose weights are the mean of all the members' weights.")
]
Beside = Annotated[
    list[str] | None,
    typer.Option(
        "--beside", metavar="SPEC", help="Also a member that no method mixes, such as a distilled model. Repeatable."
    ),
]
Report = Annotated[Path, typer.Option("--report", help="Folder of the report; a run that stopped goes on from it.")]
Seed = Annotated[int, typer.Option(min=0, help="Draws the rows.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave malformed rows out instead of refusing the file.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Plots = Annotated[
    bool | None,
    typer.Option("--plots/--no-plots", help="Draw plots, which needs matplotlib; default: if it is installed."),
]


@app.command()
def audit(
    ctx: typer.Context,
    files: Files,
    models: Models = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Per file; default 50, or all if fewer.")] = None,
    prompt: Annotated[str, typer.Option(help="What the weights see: 32, 20% or 32|20% (the shorter).")] = "32|20%",
    length: Annotated[int, typer.Option(min=16, help="Maximum tokens of a document.")] = 512,
    weighting: Annotated[str, typer.Option("--weighting", "-w", help="The pack's weighting.")] = "em",
    report: Report = Path("packllm-audit"),
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    plots: Plots = None,
) -> None:
    """Audit a corpus: which members help, which never get weight, and what each costs.

    Compares the pack with each member alone and with the pack without it.

    [dim]Examples:[/]

    packllm eval mycorpus.jsonl

    packllm eval notes.txt -m ./base -m ./base+./law --documents 30 --report out
    """
    from packllm_eval import lm
    from packllm_eval import report as reports
    from packllm_eval.methods import Method
    from packllm_eval.records import alone_in
    from packllm_eval.tables import lm_table, uses

    draws = reports.can_plot(plots)
    rows = _documents(files, documents, seed, skip_bad, 50)
    ctx.with_resource(alone_in(report))
    pack = _load(models, dtype)
    names = [member.name for member in pack.members]
    options = {"weighting": weighting}
    methods = [Method(weighting, options)]
    if len(names) > 1:
        methods += [Method(f"{weighting} without {n}", options, tuple(m for m in names if m != n)) for n in names]
    notes = {"seed": seed}
    records = lm.evaluate(
        pack, rows, report / "records.jsonl", methods=methods, prompts=(prompt,), length=length, notes=notes
    )
    entries, audited = lm_table(records), uses(records, weighting)
    parts = [reports.left_out(records), reports.audit(audited), reports.markdown(entries, reports.LM, True)]
    content = {"audit": [use.as_dict() for use in audited], "table": [entry.as_dict() for entry in entries]}
    reports.write(report, "Audit of a pack", parts, content)
    if draws:
        reports.plot_weights(report / "weights.png", entries, weighting)
    _finish(parts[:2], report)


@app.command("lm")
def lm_command(
    ctx: typer.Context,
    files: Files,
    models: Models = None,
    method: MethodNames = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What the weights see: 32, 20% or 32|20% (the shorter, default). Repeat it for several."),
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Per file; default 200, or all if fewer.")] = None,
    length: Annotated[int, typer.Option(min=16, help="Maximum tokens of a document.")] = 512,
    average: Average = False,
    beside: Beside = None,
    report: Report = Path("packllm-lm"),
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    plots: Plots = None,
) -> None:
    """Language modelling: weights from the start of each document, bits per byte of the rest.

    [dim]Example:[/]

    packllm eval lm a.jsonl b.txt --method em --method sim:tau=1 --prompt 32 --prompt 128
    """
    from packllm_eval import lm
    from packllm_eval import report as reports
    from packllm_eval.records import alone_in
    from packllm_eval.tables import AVERAGE, lm_table

    draws = reports.can_plot(plots)
    rows = _documents(files, documents, seed, skip_bad, 200)
    ctx.with_resource(alone_in(report))
    pack, methods, names = _with_methods(_load(models, dtype), method, average, beside, dtype)
    prompts = tuple(prompt or (lm.PROMPT,))
    records = lm.evaluate(
        pack,
        rows,
        report / "records.jsonl",
        methods=methods,
        prompts=prompts,
        length=length,
        notes={"seed": seed},
    )
    tables = {p: lm_table(records, p, best_of=names) for p in prompts}
    parts = [reports.left_out(records)]
    for p, entries in tables.items():
        parts += [f"## Prompt {p}", reports.markdown(entries, reports.LM, True)]
    content = {p: [entry.as_dict() for entry in entries] for p, entries in tables.items()}
    reports.write(report, "Language modelling", parts, content)
    if draws:
        entries = tables[prompts[0]]
        last = AVERAGE if any(entry.corpus == AVERAGE for entry in entries) else entries[0].corpus
        reports.plot_scores(report / "scores.png", entries, "bits/byte", last)
        for label in [entry.method for entry in entries if entry.corpus == last and entry.weights][:1]:
            reports.plot_weights(report / "weights.png", entries, label)
        if len(prompts) > 1:
            reports.plot_lengths(report / "lengths.png", records)
    _finish([parts[0], _last(tables[prompts[0]], reports.LM, True)], report)


@app.command("choice")
def choice_command(
    ctx: typer.Context,
    files: Files,
    models: Models = None,
    method: MethodNames = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each question.")] = 0,
    questions: Annotated[int | None, typer.Option(min=1, help="Per file; default 256, or all if fewer.")] = None,
    template: Annotated[str, typer.Option(help="choices, plain or continue.")] = "choices",
    average: Average = False,
    beside: Beside = None,
    report: Report = Path("packllm-choice"),
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
    plots: Plots = None,
) -> None:
    """Multiple choice: weights from the question only, accuracy of the fused likelihoods.

    [dim]Example:[/]

    packllm eval choice arc_easy.jsonl --shots 5 --questions 64
    """
    from packllm_eval import choice
    from packllm_eval import report as reports
    from packllm_eval.records import alone_in
    from packllm_eval.tables import choice_table

    draws = reports.can_plot(plots)
    tasks = _tasks(files, questions, shots, seed, skip_bad, choices=True)
    ctx.with_resource(alone_in(report))
    pack, methods, names = _with_methods(_load(models, dtype), method, average, beside, dtype)
    records = []
    for name, (drawn, examples) in tasks.items():
        records += choice.evaluate(
            pack,
            drawn,
            report / f"records-{name}.jsonl",
            methods=methods,
            template=template,
            shots=examples,
            notes={"seed": seed},
        )
    entries = choice_table(records, best_of=names)
    parts = [reports.left_out(records), reports.markdown(entries, reports.CHOICE, False)]
    reports.write(report, f"Multiple choice, {shots}-shot", parts, {"table": [entry.as_dict() for entry in entries]})
    if draws:
        reports.plot_scores(report / "accuracy.png", entries, "accuracy", entries[-1].corpus)
    _finish([parts[0], _last(entries, reports.CHOICE, False)], report)


@app.command("generate")
def generate_command(
    ctx: typer.Context,
    files: Files,
    models: Models = None,
    method: MethodNames = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each question.")] = 5,
    questions: Annotated[int | None, typer.Option(min=1, help="Per file; default 256, or all if fewer.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 256,
    average: Average = False,
    beside: Beside = None,
    report: Report = Path("packllm-generate"),
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    dtype: Dtype = "auto",
) -> None:
    """Generation: the last number (or the text) of each answer must match, as in GSM8K.

    [dim]Example:[/]

    packllm eval generate gsm8k.jsonl --method em --method top1 --shots 3
    """
    from packllm_eval import generate
    from packllm_eval import report as reports
    from packllm_eval.records import alone_in
    from packllm_eval.tables import generate_table

    tasks = _tasks(files, questions, shots, seed, skip_bad, choices=False)
    ctx.with_resource(alone_in(report))
    pack, methods, names = _with_methods(_load(models, dtype), method, average, beside, dtype)
    records = []
    for name, (drawn, examples) in tasks.items():
        records += generate.evaluate(
            pack,
            drawn,
            report / f"records-{name}.jsonl",
            methods=methods,
            shots=examples,
            max_tokens=max_tokens,
            notes={"seed": seed},
        )
    entries = generate_table(records, best_of=names)
    parts = [reports.left_out(records), reports.markdown(entries, reports.GENERATE, False)]
    reports.write(report, f"Generation, {shots}-shot", parts, {"table": [entry.as_dict() for entry in entries]})
    _finish(parts, report)


@app.command("fit")
def fit_command(
    weighting: Annotated[str, typer.Argument(help="cbtm or router.", show_default=False)],
    texts: Annotated[
        list[str],
        typer.Argument(metavar="MEMBER=FILE", help="cbtm: an expert's corpus; router: prompts that it is best at."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("fitted.npz"),
    seed: Annotated[int, typer.Option(min=0, help="Of k-means and of the classifier.")] = 0,
    skip_bad: SkipBad = False,
) -> None:
    """Train the rivals that see only the prompt's words: centroids of corpora (cbtm) or a classifier (router).

    [dim]Example:[/]

    packllm eval fit cbtm law=statutes.jsonl medicine=leaflets.txt --out cbtm.npz

    packllm eval lm a.jsonl -m ./law -m ./medicine --method em --method cbtm:fitted=cbtm.npz
    """
    from packllm.errors import OptionError
    from packllm.weights import cbtm, router
    from packllm_eval.rows import read_documents

    texts_of: dict[str, list[str]] = {}
    for pair in texts:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise OptionError(f"{pair!r} is not MEMBER=FILE")
        texts_of.setdefault(name, []).extend(
            d.text for d in read_documents(Path(path), "skip" if skip_bad else "raise")
        )
    if weighting == "cbtm":
        cbtm.fit(texts_of, out, seed=seed)
    elif weighting == "router":
        labelled = [(text, name) for name, corpus in texts_of.items() for text in corpus]
        router.fit([text for text, _ in labelled], [name for _, name in labelled], out, seed=seed)
    else:
        raise OptionError(f"weighting={weighting!r} cannot be fitted; use cbtm or router")
    typer.echo(json.dumps({"fitted": str(out), "texts": {name: len(corpus) for name, corpus in texts_of.items()}}))


def _documents(files: list[Path], count: int | None, seed: int, skip_bad: bool, default: int) -> list[Any]:
    from packllm_eval.files import names
    from packllm_eval.rows import read_documents, sample

    bad: Any = "skip" if skip_bad else "raise"
    named = zip(files, names(files), strict=True)
    return sample([row for path, name in named for row in read_documents(path, bad, name)], count, seed, default)


def _tasks(
    files: list[Path], count: int | None, shots: int, seed: int, skip_bad: bool, choices: bool
) -> dict[str, tuple[list[Any], dict[str, list[Any]]]]:
    """Questions and worked examples by file name."""
    from packllm_eval.choice import draw
    from packllm_eval.files import names
    from packllm_eval.rows import read_questions

    bad: Any = "skip" if skip_bad else "raise"
    named = zip(files, names(files), strict=True)
    return {name: draw(read_questions(path, bad, choices, name), count, shots, seed) for path, name in named}


def _with_methods(
    pack: Pack, method: list[str] | None, with_average: bool, beside: list[str] | None, dtype: str
) -> tuple[Pack, list[Any] | None, tuple[str, ...]]:
    """The pack, the methods, and the members' names. --average and --beside add members to the pack; no method uses
    these unless it names them."""
    from packllm.engines.transformers.merge import average
    from packllm.pack import Pack
    from packllm_eval.methods import Method, ready

    names = tuple(member.name for member in pack.members)
    others = [*([average(pack.models)] if with_average else []), *(beside or [])]
    if not others:
        return pack, list(method) if method else None, names
    parsed = [Method.parse(m) for m in method] if method else [Method.parse(m.label) for m in ready(pack, None)]
    methods = [Method(m.label, m.options, m.members or names) for m in parsed]
    return Pack.load([*pack.members, *others], dtype=dtype), methods, names


def _load(models: list[str] | None, dtype: str) -> Pack:
    from transformers.utils import logging as transformers_logging

    from packllm.pack import Pack

    transformers_logging.set_verbosity_error()
    logging.getLogger("packllm").setLevel(logging.WARNING)
    specs = [spec for argument in models or () for spec in argument.split(",")]
    return Pack.load(specs, dtype=dtype) if specs else Pack.starter(dtype=dtype)


def _last(entries: list[Entry], headings: tuple[str, str], lower_is_better: bool) -> str:
    from packllm_eval.report import markdown

    return markdown([entry for entry in entries if entry.corpus == entries[-1].corpus], headings, lower_is_better)


def _finish(parts: list[str], report: Path) -> None:
    Console().print(Markdown("\n\n".join(part for part in parts if part)))
    typer.echo(json.dumps({"report": str(report)}))
