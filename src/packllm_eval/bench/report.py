"""The report of the benchmarks, and its table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Target:
    """A figure's label, unit and target: an upper bound, or a lower one with `least`; None without a target."""

    label: str
    unit: str = ""
    limit: float | None = None
    least: bool = False

    def ok(self, value: float | None) -> bool | None:
        if value is None or self.limit is None:
            return None
        return value >= self.limit if self.least else value <= self.limit


TARGETS: dict[str, Target] = {
    "weighting.em": Target("em / prefill", limit=0.01),
    "weighting.exact": Target("exact / prefill", limit=0.15),
    "weighting.exact_over_opt": Target("exact / opt", limit=1.0),
    "weighting.opt": Target("opt / prefill"),
    "weighting.map": Target("map / prefill", limit=0.15),
    "weighting.sim": Target("sim / prefill"),
    "weighting.top1": Target("top1 / prefill"),
    "weighting.scoring": Target("reading out the scores / prefill without"),
    "memory.em": Target("memory that em adds", "MiB", 300.0),
    "memory.exact": Target("memory that exact adds", "MiB", 300.0),
    "decoding.alone": Target("pack of one / transformers.generate", limit=1.05),
    "decoding.one_hot": Target("all weight on one of K / that member alone", limit=1.1),
    "decoding.fused": Target("K fused / sum of the K alone", limit=1.0),
    "decoding.one_batch": Target("K adapters of one base fused / one alone", limit=1.8),
    "speed.speculative": Target("speculative, 3 models: speed / plain fusion", "x", 1.5, least=True),
    "speed.speculative_top": Target("speculative, 3 models: speed / top one alone", "x", 0.5, least=True),
    "speed.second_question": Target("first token: second question / first", limit=0.15),
    "speed.batch": Target("throughput: batch of 8 / of 1", "x", 2.5, least=True),
    "speed.naive": Target("naive loop of the paper / ours, K = 3", "x", 30.0, least=True),
    "moving.adapt": Target("adapting, 3 members / a step of theirs", limit=0.005),
    "moving.sleep_models": Target("3 models, one awake: speed / all awake", "x", 1.5, least=True),
    "moving.sleep_adapters": Target("adapters, one awake: speed / all awake", "x", 1.2, least=True),
    "moving.calibrate": Target("calibration / scoring prefill, a token", limit=1.1),
    "modes.cool": Target("segments (cool) / the members alone, summed"),
    "modes.cool+rerank": Target("cool+rerank / the members alone, summed"),
    "modes.mined": Target("mined / the members alone, summed"),
    "company.threads": Target("eight threads / the same as one batch", limit=1.2),
    "company.tasks": Target("32 asyncio tasks / one batch of 32", limit=1.3),
    "company.beside": Target("a short question beside a long one / alone", limit=3.0),
    "company.passes": Target("passes: 64 requests / one batch of 64", limit=1.5),
    "growth.rows": Target("a step of eight rows / of one"),
    "growth.1024": Target("step after 1,024 tokens / after 128"),
    "growth.4096": Target("step after 4,096 tokens / after 128"),
    "growth.8000": Target("step after 8,000 tokens / after 128"),
    "growth.members": Target("a step of 16 models / 16 steps of one", limit=1.1),
    "threads.busy": Target("two threads beside a busy core / one", limit=1.3),
    "threads.busy_spinning": Target("the same, threads that spin"),
    "threads.idle": Target("two threads on idle cores / one"),
    "threads.idle_spinning": Target("the same, threads that spin"),
    "serve.batch": Target("serve: tokens/s of 8 clients / of one batch of 8", "x", 0.85, least=True),
    "serve.llama_cpp_1": Target("serve: 1 client / llama-cpp-python's server", "x", 0.9, least=True),
    "serve.llama_cpp_8": Target("serve: 8 clients / llama-cpp-python's server", "x", 0.9, least=True),
    "serve.first_p50": Target("serve: first token of 8 clients, half within", "s"),
    "serve.first_p95": Target("serve: first token of 8 clients, 95 % within", "s"),
    "start.import": Target("import packllm / transformers, torch", limit=1.3),
    "start.import_pack": Target("from packllm import Pack / the same", limit=1.3),
    "start.load": Target("second Pack.starter()", "s", 8.0),
    "start.process": Target("a process that does it, imports included", "s"),
}


@dataclass
class Report:
    """The figures by the keys of TARGETS, None if one cannot be measured here; the machine, and the settings.

    Attributes:
        seconds: the medians behind the ratios.
        notes: remarks for the reader.
    """

    machine: dict[str, Any]
    setting: dict[str, Any]
    figures: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(TARGETS))
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ok(self, key: str) -> bool | None:
        return TARGETS[key].ok(self.figures[key])

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-safe values."""
        figures = {
            key: {"value": value, "unit": TARGETS[key].unit, "target": TARGETS[key].limit, "ok": self.ok(key)}
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
    """Print the report as a table, 80 columns wide."""
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
        target = TARGETS[key]
        verdict = {True: Text("ok", "green"), False: Text("missed", "red"), None: Text("")}[report.ok(key)]
        bound = "" if target.limit is None else f"{'≥' if target.least else '≤'} {_shown(target.limit, target.unit)}"
        table.add_row(target.label, _shown(value, target.unit), bound, verdict)
    console.print(table)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    number = f"{value:.0f}" if unit == "MiB" else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
    return f"{number} {unit}".rstrip()
