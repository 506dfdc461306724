"""What the commands share: their arguments, and the pack and options that these name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packllm.errors import OptionError

if TYPE_CHECKING:  # torch and transformers take seconds to import; --help should not wait for them
    from packllm.pack import Pack

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
        help="How members are weighted: em (default), uniform, top1, sim, opt, exhaustive, exact, map, dexperts, "
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
PriorFile = Annotated[Path | None, typer.Option("--prior", help="A prior over members, written by packllm calibrate.")]
Explain = Annotated[
    Path | None,
    typer.Option(
        "--explain",
        metavar="FILE.html",
        dir_okay=False,
        writable=True,
        help="Write a page with each member's log-probabilities of the text and files, and its part in the answer.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def quieten_transformers() -> None:
    """Turn off the warnings and advice that transformers prints."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def load_pack(models: list[str] | None, options: dict[str, Any]) -> Pack:
    """The pack of these specs; without any, the starter pack."""
    from packllm.pack import Pack

    quieten_transformers()
    return Pack.load(models, **options) if models else Pack.starter(**options)


def request_options(weighting: str | None, others: list[str] | None, named: dict[str, Any]) -> dict[str, Any]:
    """The options of a pack that --weighting, --option and named arguments give.

    Raises:
        OptionError: a pair without "=", or a weight that is no number.
    """
    chosen = {name: value for name, value in named.items() if value not in (None, [])}
    if weighting is not None:
        chosen["weighting"] = _fixed(weighting) if "=" in weighting else weighting
    for pair in others or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"--option {pair!r} has no '='; write it as NAME=VALUE, for example tau=1")
        chosen[name.strip().replace("-", "_")] = value
    return chosen


def _fixed(weighting: str) -> dict[str, float]:
    weights = {}
    for pair in weighting.split(","):
        name, _, value = pair.rpartition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            raise OptionError(f"--weighting {weighting!r}: {pair!r} must be NAME=NUMBER, for example law=0.7") from None
    return weights
