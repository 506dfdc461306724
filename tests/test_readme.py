"""The README's programs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_one_program_for_each_way_in():
    assert len(BLOCKS) == 3
    assert all(len(block.strip().splitlines()) <= 15 for block in BLOCKS[1:])
    assert "langchain_packllm" in BLOCKS[1]
    assert "llama_index.llms.packllm" in BLOCKS[2]


def test_the_options_table_is_whole():
    from packllm import Options

    table = README.partition("## Options")[2].partition("## ")[0]
    named = set(re.findall(r"`([a-z_]+)`", table))
    assert set(Options.model_fields) <= named


def test_the_weightings_table_is_whole():
    from packllm.weights import WEIGHTINGS

    table = README.partition("## How the weights are computed")[2].partition("## ")[0]
    assert all(f"| `{name}`" in table for name in WEIGHTINGS)


@pytest.mark.real
@pytest.mark.parametrize("block", BLOCKS, ids=["quick start", "langchain", "llama-index"])
def test_the_programs_run(block, starter_pack, monkeypatch, capsys):
    from packllm import Pack

    # Loaded once for the whole suite; the load itself is test_starter's and the fixture's.
    monkeypatch.setattr(Pack, "starter", classmethod(lambda cls, **options: starter_pack))
    exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 5
