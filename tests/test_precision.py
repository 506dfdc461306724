"""The fastest floating-point type: measured once, and what it does to a pack."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch

from packllm import OptionError, Pack
from packllm.engines.transformers import precision


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "precision"


@pytest.fixture
def measured(monkeypatch):
    """measured(bf16 seconds a vector, a block): what a measurement finds (float32: 1 and 1); returns the calls."""

    def fake(vector: float, block: float) -> list:
        calls = []

        def seconds(dtype: torch.dtype, rows: int) -> float:
            calls.append((dtype, rows))
            return 1.0 if dtype == torch.float32 else vector if rows == 1 else block

        monkeypatch.setattr(precision, "_seconds", seconds)
        return calls

    return fake


@pytest.mark.parametrize(
    ("vector", "block", "expected"),
    [
        (0.5, 0.1, torch.bfloat16),
        (1.2, 0.1, torch.bfloat16),  # 64 · 1.2 + 16 · 0.1 = 78.4, against 64 + 16 = 80
        (1.2, 0.3, torch.float32),  # 81.6
        (0.9, 1.5, torch.float32),  # 81.6
        (1.0, 1.0, torch.float32),
    ],
)
def test_the_least_time_of_a_request_wins(folder, measured, vector, block, expected):
    measured(vector, block)
    assert precision.fastest() == expected


def test_it_is_measured_once(folder, measured, monkeypatch):
    calls = measured(0.5, 0.5)
    assert {precision.fastest(), precision.fastest()} == {torch.bfloat16}
    assert len(calls) == 4
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == {"float32": [1.0, 1.0], "bfloat16": [0.5, 0.5]}
    monkeypatch.setattr(precision, "_key", lambda: "another-cpu")
    precision.fastest()
    assert len(calls) == 8


@pytest.mark.parametrize("text", ["", "[]", "{", '{"float32": [1, 1]}', '{"float32": [1], "bfloat16": [1]}'])
def test_a_spoilt_file_is_measured_again(folder, measured, text):
    folder.mkdir(parents=True)
    (folder / f"{precision._key()}.json").write_text(text)
    calls = measured(0.5, 0.5)
    assert precision.fastest() == torch.bfloat16
    assert len(calls) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(folder, measured):
    folder.mkdir(parents=True)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    measured(0.5, 0.5)
    assert precision.fastest() == torch.bfloat16


def test_this_cpu(folder):
    assert all(precision._seconds(dtype, rows) > 0 for dtype in precision.CHOICES.values() for rows in precision.PASSES)
    assert precision.fastest() in precision.CHOICES.values()


def test_members_load_in_it(folder, measured, make_member, tmp_path):
    member = make_member("llama")
    member.model.save_pretrained(tmp_path / "model")
    member.tokenizer.save_pretrained(tmp_path / "model")
    exact = Pack.load([tmp_path / "model"], max_tokens=2)
    measured(0.5, 0.5)
    pack = Pack.load([tmp_path / "model"], dtype="fastest", max_tokens=2)
    assert pack.members[0].model.dtype == torch.bfloat16
    prompt = "The court shall order relief"
    assert pack.weigh(prompt).nll == pytest.approx(exact.weigh(prompt).nll, rel=0.05)
    with pytest.raises(OptionError, match="valid: auto, fastest, float32"):
        Pack.load([tmp_path / "model"], dtype="fast")
