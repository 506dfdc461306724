"""The command line: packllm ask | weigh | check | serve | eval | bench | distill | align | calibrate."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from packllm import terminal
from packllm.command_arguments import (
    AsJson,
    Explain,
    Models,
    Others,
    PriorFile,
    WeightingName,
    load_pack,
    quieten_transformers,
    request_options,
)
from packllm.errors import ExtraError, PackError

if TYPE_CHECKING:  # torch and transformers take seconds to import; --help should not wait for them
    pass

ELSEWHERE = {"eval": ("packllm_eval.command", "eval"), "serve": ("packllm.serve.command", "serve")}
"""Commands in optional packages: the module of each, and the extra that installs what it needs."""


class Commands(typer.core.TyperGroup):
    """Prints expected errors as one red line on stderr, with exit code 2. Imports the modules of ELSEWHERE on use."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ELSEWHERE:
            return args[0], typer.main.get_command(_elsewhere(*ELSEWHERE[args[0]]).app), args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                if not sys.warnoptions:  # libraries' warnings would interrupt the answer on a terminal
                    warnings.simplefilter("ignore")
                return super().invoke(ctx)
        except PackError as error:
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]Error: {escape(str(error))}[/]")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("eval")
def evaluate() -> None:
    """Compare the pack with its members and with rivals on your own files."""


@app.command()
def serve() -> None:
    """Serve the pack behind OpenAI's protocol."""


def _elsewhere(module: str, extra: str) -> Any:
    """Import a module of an optional package; ExtraError if the module or something it needs is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ExtraError("this command", str(error.name).partition(".")[0], extra) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        from packllm import __version__

        typer.echo(f"packllm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Several local language models answer as one model.

    Every member scores the prompt; members that predict it best get the most weight in the answer.
    """


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question; - reads it from standard input.", show_default=False)],
    model: Models = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            "-f",
            exists=True,
            dir_okay=False,
            help="A text file to put before the question as context. Repeat it for more.",
        ),
    ] = None,
    weighting: WeightingName = None,
    prior: PriorFile = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the answer; default 256.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy decoding; above 0, tokens are sampled.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling; the same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text. Repeatable.")] = None,
    option: Others = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without chat templates.")] = False,
    explain: Explain = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the answer, without the table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question, and show the weight of each member.

    [dim]Examples:[/]

    packllm ask "How is high blood pressure treated?"

    packllm ask "Who may appeal?" --file ruling.txt --max-tokens 80

    packllm ask - -m ./base -m ./base+./law-adapter -w exact < question.txt
    """
    named = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop, "prior": prior}
    options = request_options(weighting, option, named) | ({"chat_template": False} if raw else {})
    text = terminal.with_context(terminal.typed(question), file or [])
    more = terminal.explained(explain, file or [])
    pack = load_pack(model, options)
    prompt = text if raw else [{"role": "user", "content": text}]
    if as_json:
        answer = pack.generate(prompt, **more)
        terminal.write(answer.explanation, explain)
        typer.echo(json.dumps(answer.as_dict()))
        return
    last = None
    for last in pack.stream(prompt, **more):
        typer.echo(terminal.printable(last.text), nl=False)
    typer.echo()
    if last is not None:
        terminal.write(last.explanation, explain)
    if last is not None and not quiet:
        typer.echo()
        terminal.print_weights(last.weights.at_start)
        if last.weights.start is not None:
            moved = ", ".join(f"{n} {v:.3f}" for n, v in zip(last.weights.names, last.weights.values, strict=True))
            Console(highlight=False).print(Text(f"at the end of the answer: {moved}", style="dim"))


@app.command()
def weigh(
    text: Annotated[
        str | None, typer.Argument(help="The text; - reads it from standard input.", show_default=False)
    ] = None,
    model: Models = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", exists=True, dir_okay=False, help="A file with the text. Repeat it for more."),
    ] = None,
    weighting: WeightingName = None,
    prior: PriorFile = None,
    option: Others = None,
    explain: Explain = None,
    as_json: AsJson = False,
) -> None:
    """Show how well each member predicts a text, and the weights that this gives.

    NLL is the mean negative log-likelihood in nats; lower is better. Nothing is generated.

    [dim]Examples:[/]

    packllm weigh "The statute of limitations bars the claim."

    packllm weigh --file notes.txt --weighting sim --option tau=1
    """
    options = request_options(weighting, option, {"prior": prior})
    weighed, more = terminal.weighed(text, file or []), terminal.explained(explain, file or [])
    weights = load_pack(model, options).weigh(weighed, **more)
    terminal.write(weights.explanation, explain)
    if as_json:
        typer.echo(json.dumps(weights.as_dict()))
    else:
        terminal.print_weights(weights)


@app.command()
def check(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Hub ids, folders, .gguf files, base+adapter.")
    ],
    dtype: Annotated[str, typer.Option(help="Type of the weights, as in Pack.load.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Show the memory that models will take, before they are loaded.

    Shows bytes of the weights and of the KV cache, per token and for a full
    context window, and the memory that is free here; and whether the models
    share a vocabulary, a chat template and an end token. Reads configs and
    file headers only, no weights.

    [dim]Examples:[/]

    packllm check ./base ./base+./law-adapter

    packllm check general=./model-7b ./other.gguf --json
    """
    quieten_transformers()
    from packllm.engines.memory import estimate

    footprints = estimate(models, dtype=dtype)
    if as_json:
        typer.echo(json.dumps(footprints.as_dict()))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    heading, *rows = footprints.rows()
    for at, name in enumerate(heading):
        table.add_column(name, justify="left" if at < 3 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    console.print(table)
    console.print(Text("\n".join(footprints.remarks()), style="dim"))


@app.command()
def calibrate(
    rows: Annotated[Path, typer.Argument(metavar="QA.JSONL", help="Rows of question, context and gold answer.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, for --prior and the option prior.")],
    model: Models = None,
    option: Others = None,
    as_json: AsJson = False,
) -> None:
    """Learn a prior over the members from your own answered questions.

    Rows are JSON: question, context (or passages, a list; or messages, instead
    of both) and answer. With ten rows or more, it also tests whether the prior helps.

    [dim]Examples:[/]

    packllm calibrate qa.jsonl --out prior.json

    packllm ask "Who may appeal?" --file ruling.txt --prior prior.json
    """
    from packllm.weights.calibrate import calibrate, read_rows

    examples = read_rows(rows)
    prior = calibrate(load_pack(model, request_options(None, option, {})), examples)
    prior.save(out)
    if as_json:
        typer.echo(json.dumps(prior.as_dict()))
    else:
        typer.echo(prior.worth.summary(tuple(prior)))


@app.command()
def bench(
    model: Models = None,
    tokens: Annotated[int, typer.Option(min=16, help="Length of the prompt that is weighed.")] = 512,
    members: Annotated[
        int, typer.Option(min=2, help="Number of members; if there are fewer models, copies are added.")
    ] = 4,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions of each measurement; the median is reported.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Group to measure; repeatable. Default: all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short lengths, to test that it runs; the figures mean nothing.")
    ] = False,
) -> None:
    """Measure the cost of packing on this machine, against its targets.

    Prints a table, then one line of JSON. Figures that are compared are
    measured alternately in one run. Without --model and the starter pack,
    small members with random weights are measured, and the table says so.

    [dim]Examples:[/]

    packllm bench

    packllm bench --only decoding --only speculation

    packllm bench --model ./base --tokens 256 --repeat 5 | tail -n 1
    """
    quieten_transformers()
    benchmark = _elsewhere("packllm_eval.bench", "eval")
    report = benchmark.run(model, tokens=tokens, members=members, repeat=repeat, quick=quick, only=only or ())
    benchmark.show(report, Console())
    typer.echo(json.dumps(report.as_dict()))


@app.command()
def distill(
    files: Annotated[list[Path], typer.Argument(help="Training texts: .jsonl, .txt or .md files, or folders of them.")],
    student: Annotated[str, typer.Option("--student", help="The member to train.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the result; an interrupted run resumes from it.")],
    model: Models = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="Evaluation texts; repeatable. Default: one in ten of the training texts."),
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Training documents of each file; default 200.")] = None,
    compared: Annotated[int | None, typer.Option(min=1, help="Evaluation documents of each file; default 20.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of a LoRA adapter.")] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rank of a new adapter. Default: 16; or, if members are adapters of the student, the sum of "
            "their ranks: the adapter then starts from their mean.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training texts.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per training step.")] = 2,
    rate: Annotated[float | None, typer.Option(help="Learning rate; default 8e-4, with --full 5e-5.")] = None,
    length: Annotated[int, typer.Option(min=16, help="Most tokens of a text.")] = 512,
    weighting: WeightingName = None,
    option: Others = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the choice of texts and of the adapter's initial weights.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Train one member to predict like the whole pack on your texts: one small model instead of several.

    Prints bits per byte of held-out texts for each member, the pack, and the
    distilled member. Needs the extra `distill`.

    [dim]Examples:[/]

    packllm distill notes.jsonl --student general --out distilled

    packllm distill a.txt b.txt -m ./base -m ./base+./law --student base --out one && packllm ask "Who?" -m one
    """
    distilling = _elsewhere("packllm_eval.distill.command", "distill")
    training = distilling.Training(full, rank, epochs, batch_size, rate, seed)
    texts, others = distilling.texts(files, held_out or [], documents, compared, seed)
    pack = load_pack(model, request_options(weighting, option, {}))
    distilling.run(pack, student, texts, others, out, training, length, as_json)


@app.command()
def align(
    reference: Annotated[
        str, typer.Argument(help="The tokenizer to cover: a hub id, folder, .gguf or tokenizer.json file.")
    ],
    target: Annotated[str, typer.Argument(help="The tokenizer that covers it: the same kinds of source.")],
    as_json: AsJson = False,
) -> None:
    """Show how well one tokenizer's vocabulary covers another's.

    Each token is mapped to the nearest token of the other vocabulary by edit
    distance in bytes, as decoding="mined" does. A large vocabulary takes up
    to a minute, once; the mapping is then cached.

    [dim]Examples:[/]

    packllm align ./smollm2 ./gemma-3

    packllm align llama-3/tokenizer.json qwen-3/tokenizer.json --json
    """
    quieten_transformers()
    from packllm import coverage

    coverage_report = coverage.measure(reference, target)
    if as_json:
        typer.echo(json.dumps(coverage_report.as_dict()))
    else:
        coverage.show(coverage_report, Console(highlight=False))
