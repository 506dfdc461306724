"""packllm ask | weigh | check | serve | eval | bench | distill | align | calibrate: the pack on the command line."""

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
from packllm.errors import ExtraError, OptionError, PackError

if TYPE_CHECKING:  # torch and transformers take seconds to import; --help should not wait for them
    from packllm.pack import Pack

ELSEWHERE = {"eval": ("packllm_eval.command", "eval"), "serve": ("packllm.serve.command", "serve")}
"""Modules of commands, each with the extra that it needs."""


class Commands(typer.core.TyperGroup):
    """Commands whose expected errors are one red line on stderr and exit code 2. Those of ELSEWHERE are imported when
    they are called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in ELSEWHERE:
            return args[0], typer.main.get_command(_elsewhere(*ELSEWHERE[args[0]]).app), args[1:]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                if not sys.warnoptions:  # on a terminal, those of libraries would come in the middle of an answer
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

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="SPEC",
        help="A member: hub id, folder, .gguf file or base+adapter, each as name=SPEC too. Repeat it for more members. "
        "Default: the starter pack.",
    ),
]
WeightingName = Annotated[
    str | None,
    typer.Option(
        "--weighting",
        "-w",
        help="How members are weighed: em (default), uniform, top1, sim, opt, exhaustive, exact, map, dexperts, "
        "dexperts-opt, cbtm, router, or fixed weights as name=0.7,name=0.3.",
    ),
]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="Any other option of a request, such as tau=1, pool=log, unit=byte, top_p=0.9 or score_on=TEXT.",
    ),
]
PriorFile = Annotated[
    Path | None, typer.Option("--prior", help="A file of packllm calibrate: what members are worth on answers.")
]
Explain = Annotated[
    Path | None,
    typer.Option(
        "--explain",
        metavar="FILE.html",
        dir_okay=False,
        writable=True,
        help="Write a page that shows what each member gave the text and its files, and who carried the answer.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@app.command("eval")
def evaluate() -> None:
    """Compare the pack with its members and with rivals on your own files."""


@app.command()
def serve() -> None:
    """Serve the pack behind OpenAI's protocol."""


def _elsewhere(module: str, extra: str) -> Any:
    """A module of another package; ExtraError where it is not installed, or something it needs."""
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
    """Several local language models answer as one.

    Every member scores the prompt; those that know its kind of text best count most in the answer.
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
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to answer with; default 256.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; above, tokens are drawn.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text. Repeatable.")] = None,
    option: Others = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without chat templates.")] = False,
    explain: Explain = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer alone, no table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question, and show what each member counted for.

    [dim]Examples:[/]

    packllm ask "How is high blood pressure treated?"

    packllm ask "Who may appeal?" --file ruling.txt --max-tokens 80

    packllm ask - -m ./base -m ./base+./law-adapter -w exact < question.txt
    """
    named = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": stop, "prior": prior}
    options = _options(weighting, option, named) | ({"chat_template": False} if raw else {})
    text = terminal.with_context(terminal.typed(question), file or [])
    more = terminal.explained(explain, file or [])
    pack = _load(model, options)
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
    """Show how well each member predicts a text and what it would count for.

    NLL is the mean negative log-likelihood in nats; lower is better. Nothing is generated.

    [dim]Examples:[/]

    packllm weigh "The statute of limitations bars the claim."

    packllm weigh --file notes.txt --weighting sim --option tau=1
    """
    options = _options(weighting, option, {"prior": prior})
    weighed, more = terminal.weighed(text, file or []), terminal.explained(explain, file or [])
    weights = _load(model, options).weigh(weighed, **more)
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
    dtype: Annotated[str, typer.Option(help="Type of the weights, as for loading.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what models will hold in memory, before they are loaded.

    Bytes of weights as they will be held and of a sequence's cache, a token and at the context window, beside what is
    free here; and whether the models share a vocabulary, a chat template and an end. By configs and headers of files:
    no weights are read.

    [dim]Examples:[/]

    packllm check ./base ./base+./law-adapter

    packllm check general=./model-7b ./other.gguf --json
    """
    _quieten()
    from packllm.engines.memory import estimate

    found = estimate(models, dtype=dtype)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    heading, *rows = found.rows()
    for at, name in enumerate(heading):
        table.add_column(name, justify="left" if at < 3 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    console.print(table)
    console.print(Text("\n".join(found.remarks()), style="dim"))


@app.command()
def calibrate(
    rows: Annotated[Path, typer.Argument(metavar="QA.JSONL", help="Rows of question, context and gold answer.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, for --prior and the option prior.")],
    model: Models = None,
    option: Others = None,
    as_json: AsJson = False,
) -> None:
    """Learn from your own answered questions what each member is worth on answers.

    Rows are JSON: question, context (or passages, a list; or messages, instead
    of both) and answer. From ten rows on it can tell whether that helps.

    [dim]Examples:[/]

    packllm calibrate qa.jsonl --out prior.json

    packllm ask "Who may appeal?" --file ruling.txt --prior prior.json
    """
    from packllm.weights.calibrate import calibrate, read_rows

    found = read_rows(rows)
    prior = calibrate(_load(model, _options(None, option, {})), found)
    prior.save(out)
    if as_json:
        typer.echo(json.dumps(prior.as_dict()))
    else:
        typer.echo(prior.worth.told(tuple(prior)))


@app.command()
def bench(
    model: Models = None,
    tokens: Annotated[int, typer.Option(min=16, help="Length of the prompt that is weighed.")] = 512,
    members: Annotated[int, typer.Option(min=2, help="Members; too few models are filled up with copies.")] = 4,
    repeat: Annotated[int, typer.Option(min=1, help="Times that each figure is measured; the median counts.")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Group to measure; may be repeated. All, if left out.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short lengths: whether it runs, not how fast.")] = False,
) -> None:
    """Measure what packing costs on this machine, against its targets.

    Prints a table, then one line of JSON. What is compared is measured side
    by side, in one run. Where there is neither --model nor the starter pack,
    small members with random weights are measured, and it says so.

    [dim]Examples:[/]

    packllm bench

    packllm bench --only decoding --only speculation

    packllm bench --model ./base --tokens 256 --repeat 5 | tail -n 1
    """
    _quieten()
    benchmark = _elsewhere("packllm_eval.bench", "eval")
    report = benchmark.run(model, tokens=tokens, members=members, repeat=repeat, quick=quick, only=only or ())
    benchmark.show(report, Console())
    typer.echo(json.dumps(report.as_dict()))


@app.command()
def distill(
    files: Annotated[list[Path], typer.Argument(help="Texts to learn: .jsonl, .txt or .md files, or folders of them.")],
    student: Annotated[str, typer.Option("--student", help="The member that learns.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the result; a run that stopped goes on from it.")],
    model: Models = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="Texts to compare on; repeatable. Default: one in ten of those to learn."),
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="To learn of each file; default 200.")] = None,
    compared: Annotated[int | None, typer.Option(min=1, help="To compare on, of each file; default 20.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights, not a LoRA adapter.")] = False,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of the adapter, which then starts from nothing. Default: 16; or all together, from the mean of the "
            "members that are adapters of the student.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Times that each text is learnt.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a step.")] = 2,
    rate: Annotated[float | None, typer.Option(help="Learning rate; default 8e-4, with --full 5e-5.")] = None,
    length: Annotated[int, typer.Option(min=16, help="Most tokens of a text.")] = 512,
    weighting: WeightingName = None,
    option: Others = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the texts, and the adapter's first weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Teach one member what the whole pack says of your texts: one small model instead of several.

    Prints bits per byte of held-out texts: of each member, the pack, and the
    distilled member. Needs the extra `distill`.

    [dim]Examples:[/]

    packllm distill notes.jsonl --student general --out distilled

    packllm distill a.txt b.txt -m ./base -m ./base+./law --student base --out one && packllm ask "Who?" -m one
    """
    distilling = _elsewhere("packllm_eval.distill.command", "distill")
    training = distilling.Training(full, rank, epochs, batch_size, rate, seed)
    texts, others = distilling.texts(files, held_out or [], documents, compared, seed)
    pack = _load(model, _options(weighting, option, {}))
    distilling.run(pack, student, texts, others, out, training, length, as_json)


@app.command()
def align(
    reference: Annotated[str, typer.Argument(help="Whose tokens: a hub id, folder, .gguf or tokenizer.json file.")],
    target: Annotated[str, typer.Argument(help="In whose tokens they are looked for; likewise.")],
    as_json: AsJson = False,
) -> None:
    """Show how well one tokenizer's vocabulary covers another's.

    Each token is mapped to the nearest of the other by edit distance in bytes:
    what decoding="mined" reads instead of it. Large vocabularies take up to a
    minute once; the mapping is then kept.

    [dim]Examples:[/]

    packllm align ./smollm2 ./gemma-3

    packllm align llama-3/tokenizer.json qwen-3/tokenizer.json --json
    """
    _quieten()
    from packllm import coverage

    found = coverage.measure(reference, target)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    else:
        coverage.show(found, Console(highlight=False))


def _quieten() -> None:
    """Leave out the advice of the libraries below."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def _load(models: list[str] | None, options: dict[str, Any]) -> Pack:
    from packllm.pack import Pack

    _quieten()
    return Pack.load(models, **options) if models else Pack.starter(**options)


def _options(weighting: str | None, others: list[str] | None, named: dict[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in named.items() if value not in (None, [])}
    if weighting is not None:
        options["weighting"] = _fixed(weighting) if "=" in weighting else weighting
    for pair in others or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"--option {pair!r} has no '='; write it as NAME=VALUE, for example tau=1")
        options[name.strip().replace("-", "_")] = value
    return options


def _fixed(weighting: str) -> dict[str, float]:
    weights = {}
    for pair in weighting.split(","):
        name, _, value = pair.rpartition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise OptionError(f"--weighting {weighting!r}: {pair!r} is not name=number") from None
    return weights
