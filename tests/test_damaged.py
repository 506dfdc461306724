"""Damaged and hostile files: what is loaded answers, or a PackError says what is wrong; nothing else, ever."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gguf import write_gguf

from packllm import Pack, PackError

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    10**9,
    2**63,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    [],
    {},
]
ODD += [[None], [[]], {"x": None}, [1, "x"], "é" * 300, "\ud800"]
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))


@pytest.fixture(scope="module")
def whole(make_member, tmp_path_factory) -> Path:
    """A folder of sound files: base (a model), more (an adapter), tiny.gguf."""
    folder = tmp_path_factory.mktemp("whole")
    member = make_member("llama", 3)
    member.model.save_pretrained(folder / "base")
    member.tokenizer.save_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, alpha_pattern={"q_proj": 3}
    )
    tuned = peft.get_peft_model(copy.deepcopy(member.model), config)
    tuned.save_pretrained(folder / "more")
    write_gguf(member, folder / "tiny.gguf")
    return folder


@pytest.fixture
def spoilt(whole, tmp_path) -> Path:
    """A copy of them to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "spoilt"))


def tried(specs: list[Any]) -> str | None:
    """What the PackError says that loading or asking raised; None where it answered."""
    try:
        with Pack.load(specs, max_tokens=2) as pack:
            pack.generate("The court shall order relief")
    except PackError as error:
        return str(error)
    return None


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The places of all values in JSON, the first of long lists and objects alone."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, own in list(inner)[:30]:
        yield from paths(own, (*at, key))


def replaced(value: Any, at: tuple, new: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return value


JSON = ["base/config.json", "base/tokenizer.json", "base/tokenizer_config.json", "base/generation_config.json"]
JSON += ["more/adapter_config.json"]


@pytest.mark.parametrize("name", JSON)
def test_any_value_of_a_json_file_replaced(whole, tmp_path, name):
    folder = Path(shutil.copytree(whole, tmp_path / "x"))
    sound = json.loads((whole / name).read_text())
    places = list(paths(sound))

    @FUZZ
    @given(st.sampled_from(places), st.sampled_from([*ODD, ...]))
    def check(at: tuple, new: Any) -> None:
        (folder / name).write_text(json.dumps(replaced(sound, at, new)))
        tried([folder / "base", f"{folder / 'base'}+{folder / 'more'}"] if "more" in name else [folder / "base"])

    check()
