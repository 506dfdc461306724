"""The benchmark runs and reports; how fast anything is, is never a test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from lines import scored
from typer.testing import CliRunner

from packllm.cli import app
from packllm_eval.bench.measure import peak_mib, ratio
from packllm_eval.bench.report import TARGETS, Report
from packllm_eval.bench.subjects import noisy_copy, random_member, text_of

UNMEASURED = {
    *(f"start.{name}" for name in ("load", "process", "import", "import_pack")),
    *(f"threads.{name}" for name in ("busy", "busy_spinning", "idle", "idle_spinning")),
    *(f"growth.{length}" for length in (1024, 4096, 8000)),
    *(f"serve.{name}" for name in ("batch", "llama_cpp_1", "llama_cpp_8", "first_p50", "first_p95")),
}
"""What a quick run leaves out, or small models have no room for."""
CAN_RESET_PEAK = Path("/proc/self/clear_refs").exists()


@pytest.fixture(scope="module")
def folder(make_member, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    member = make_member("llama")
    member.model.save_pretrained(path)
    member.tokenizer.save_pretrained(path)
    return str(path)


def test_quick_bench_ends_in_one_line_of_json(folder, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["bench", "--model", folder, "--members", "3", "--quick"])
    assert result.exit_code == 0, result.output
    *table, last = result.stdout.splitlines()
    report = json.loads(last)
    assert set(report["figures"]) == set(TARGETS)
    for key, figure in report["figures"].items():
        # no adapters of one base, one vocabulary
        apart = key in ("decoding.one_batch", "moving.sleep_adapters") or key.startswith("modes.")
        if apart or key in UNMEASURED or (key.startswith("memory.") and not CAN_RESET_PEAK):
            assert figure["value"] is None, key
            continue
        assert math.isfinite(figure["value"]), key
        assert figure["target"] is None or figure["ok"] is TARGETS[key].ok(figure["value"])
    assert {"cores", "threads", "torch", "transformers"} <= set(report["machine"])
    assert report["setting"]["dtype"] == ["float32"]
    assert len(set(report["setting"]["members"])) == 3
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in report["seconds"].values())
    for target in TARGETS.values():
        assert any(line.startswith(target.label) for line in table), target.label
    assert max(map(len, table)) <= 80


def test_members_of_different_vocabularies(folder, make_member, tmp_path) -> None:
    other = make_member("gemma", 3, tokenizer="words")
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    models = ["--model", folder, "--model", str(tmp_path / "other")]
    result = CliRunner().invoke(app, ["bench", *models, "--members", "2", "--quick"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])["figures"]
    missing = {key for key, figure in figures.items() if figure["value"] is None} - {"memory.em", "memory.exact"}
    wanted = {"exact", "exact_over_opt", "opt", "map"}
    apart = {"decoding.fused", "decoding.one_batch", "moving.sleep_adapters", "speed.batch", "speed.naive"}
    assert missing == {f"weighting.{name}" for name in wanted} | apart | UNMEASURED


def test_random_members_and_their_copies() -> None:
    member = random_member(quick=True)
    twin = noisy_copy(member, seed=1)
    text = text_of([member, twin], 40)
    ids = member.encoder.encode(text).ids
    assert 20 < len(ids) <= 40
    observed = [scored(one, ids)[1] for one in (member, twin)]
    assert all(scores.isfinite().all() for scores in observed)
    assert not torch.equal(*observed)


def test_a_ratio_is_the_median_over_repeats() -> None:
    assert ratio([1.0, 9.0, 4.0], [2.0, 3.0, 2.0]) == 2.0  # 0.5, 3, 2
    assert ratio(None, [1.0]) is None


def test_a_verdict_needs_a_value_and_a_target() -> None:
    report = Report({}, {})
    report.figures |= {"weighting.em": 0.005, "weighting.exact": 0.5, "weighting.sim": 0.1}
    assert report.ok("weighting.em") is True
    assert report.ok("weighting.exact") is False
    assert report.ok("weighting.sim") is None
    assert report.ok("memory.em") is None


@pytest.mark.skipif(not CAN_RESET_PEAK, reason="this system does not let a process reset its peak memory")
def test_peak_memory_sees_what_is_freed_again() -> None:
    def hold(mib: int) -> None:
        torch.ones(mib * 2**18)

    low, high = peak_mib([], hold, 1), peak_mib([], hold, 201)
    assert high - low == pytest.approx(200, abs=20)
