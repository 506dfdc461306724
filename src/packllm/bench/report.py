"""What the bench found, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

TARGETS: dict[str, tuple[str, str, float | None]] = {  # key -> what it says, unit, target (at most)
    "weighting.em": ("em / prefill", "", 0.01),
    "weighting.exact": ("exact / prefill", "", 0.3),
    "weighting.exact_over_opt": ("exact / opt", "", 1.0),
    "weighting.opt": ("opt / prefill", "", None),
    "weighting.map": ("map / prefill", "", None),
    "weighting.sim": ("sim / prefill", "", None),
    "weighting.top1": ("top1 / prefill", "", None),
    "weighting.scoring": ("reading out the scores / prefill without", "", None),
    "memory.em": ("memory that em adds", "MiB", 300.0),
    "memory.exact": ("memory that exact adds", "MiB", 300.0),
    "decoding.alone": ("pack of one / transformers.generate", "", 1.1),
    "decoding.one_hot": ("all weight on one of K / that member alone", "", 1.1),
    "decoding.fused": ("K fused / sum of the K alone", "", 1.0),
    "start.load": ("second Pack.starter()", "s", 8.0),
    "start.process": ("a process that does it, imports included", "s", None),
}


@dataclass
class Report:
    """Figures by the keys of TARGETS (None where one cannot be measured here), and what they were measured on.

    Attributes:
        seconds: the medians behind the ratios.
        notes: what a reader has to know.
    """

    machine: dict[str, Any]
    setting: dict[str, Any]
    figures: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(TARGETS))
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ok(self, key: str) -> bool | None:
        value, target = self.figures[key], TARGETS[key][2]
        return None if value is None or target is None else value <= target

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        figures = {
            key: {"value": value, "unit": TARGETS[key][1], "target": TARGETS[key][2], "ok": self.ok(key)}
            for key, value in self.figures.items()
        }
        return {
            "machine": self.machine,
            "setting": self.setting,
            "figures": figures,
            "seconds": self.seconds,
            "notes": self.notes,
        }


def show(report: Report, console: Console) -> None:
    """The report as a table, at 80 columns."""
    setting, host = report.setting, report.machine
    console.print(
        Text(
            f"{host['system']}, {host['cores']} cores, {host['threads']} threads, load {host['load']}, "
            f"torch {host['torch']}, transformers {host['transformers']}\n"
            f"{len(setting['members'])} members: {', '.join(setting['members'])}; {', '.join(setting['dtype'])} on "
            f"{', '.join(setting['device'])}\n"
            f"weighed {setting['tokens']} tokens, memory at {setting['memory_tokens']}, decoded "
            f"{setting['decode_tokens']} after {setting['decode_prompt']}; medians of {setting['repeat']}"
        )
    )
    for note in report.notes:
        console.print(Text(f"Note: {note}", style="yellow"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("figure")
    for heading in ("measured", "target"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for key, value in report.figures.items():
        label, unit, target = TARGETS[key]
        verdict = {True: Text("ok", "green"), False: Text("missed", "red"), None: Text("")}[report.ok(key)]
        table.add_row(label, _shown(value, unit), "" if target is None else f"≤ {_shown(target, unit)}", verdict)
    console.print(table)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    number = f"{value:.0f}" if unit == "MiB" else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
    return f"{number} {unit}".rstrip()
