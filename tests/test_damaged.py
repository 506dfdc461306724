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
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_gguf import write_gguf

from packllm import LoadError, Pack, PackError
from packllm.errors import DataError
from packllm_eval.rows import read_documents, read_questions

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
FUZZ = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


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
        tried(specs(folder, name))

    check()
    shutil.copy(whole / name, folder / name)
    assert tried(specs(folder, name)) is None  # sound files answer: the fuzz has tried what it means to


def specs(folder: Path, name: str) -> list[Any]:
    """What to load to read a file."""
    if name.endswith(".gguf"):
        return [folder / name]
    return [folder / "base", f"{folder / 'base'}+{folder / 'more'}"] if "more" in name else [folder / "base"]


@pytest.mark.parametrize(
    "name", ["base/model.safetensors", "base/tokenizer.json", "more/adapter_model.safetensors", "tiny.gguf"]
)
def test_any_bytes_of_a_file_flipped_or_cut(whole, tmp_path, name):
    folder = Path(shutil.copytree(whole, tmp_path / "x"))
    sound = (whole / name).read_bytes()
    near = st.one_of(st.integers(0, 300), st.integers(0, 8000), st.integers(0, len(sound) - 1))

    @FUZZ
    @given(st.lists(st.tuples(near, st.integers(0, 255)), min_size=1, max_size=3), st.booleans())
    def check(changes: list[tuple[int, int]], cut: bool) -> None:
        content = bytearray(sound)
        for at, value in changes:
            content[min(at, len(content) - 1)] = value
        (folder / name).write_bytes(content[: changes[0][0]] if cut else content)
        tried(specs(folder, name))

    check()


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def said(specs: list[Any]) -> str:
    text = tried(specs)
    assert text is not None
    assert "\n" not in text
    return text


# Hostile sizes: refused by what the weights are, before anything of that size is built


@pytest.mark.parametrize(
    "claim",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 5000},
        {"hidden_size": 10**9, "head_dim": 8},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**11},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"head_dim": 7},
        {"num_key_value_heads": 0},
        {"dtype": "float99"},
        {"hidden_act": "nothing"},
        {"model_type": "unheard_of"},
        {"model_type": "qwen3_moe", "num_experts": 10**9},
        {"rope_parameters": {"rope_type": "unheard_of"}},
    ],
    ids=str,
)
def test_a_config_that_its_weights_do_not_bear(spoilt, claim):
    edit(spoilt / "base/config.json", **claim)
    before = torch.nn.Module.__init__
    made = 0

    def counted(self, *args, **words):
        nonlocal made
        made += 1
        before(self, *args, **words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__init__", counted)
        text = said([spoilt / "base"])
    assert str(spoilt / "base") in text
    assert made < 20_000


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "hqq", "unheard", 5, None])
def test_quantised_weights_without_what_they_need(spoilt, method):
    edit(spoilt / "base/config.json", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    text = tried([spoilt / "base"])
    assert text is None or str(spoilt / "base") in text


def test_nan_in_a_weight_is_found_and_named(spoilt):
    file = spoilt / "base/model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight has NaN or infinity" in said([spoilt / "base"])


def test_an_index_may_not_leave_its_folder(spoilt):
    file = spoilt / "base/model.safetensors"
    names = list(load_file(file))
    file.rename(spoilt / "other.safetensors")
    for other in ("../other.safetensors", str(spoilt / "other.safetensors"), "weights.bin", 5, "gone.safetensors"):
        index = {"weight_map": dict.fromkeys(names, other)}
        (spoilt / "base/model.safetensors.index.json").write_text(json.dumps(index))
        assert "index" in said([spoilt / "base"]) or "weight_map" in said([spoilt / "base"])


# What the thing is


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: f.mkdir(), "an empty folder"),
        (lambda f: (f.mkdir(), (f / "pytorch_model.bin").write_text("x")), "no config.json, but pytorch_model.bin"),
        (lambda f: (f.mkdir(), (f / "x.gguf").write_text("x")), "name the file"),
        (lambda f: f.write_bytes(b"x"), "is a file, which is no model by itself"),
        (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    ],
    ids=["empty", "no config", "gguf inside", "a file", "lfs"],
)
def test_what_is_no_model_is_called_what_it_is(tmp_path, make, words):
    make(tmp_path / "thing")
    assert words in said([tmp_path / "thing"])


def test_files_that_stand_for_others(spoilt):
    (spoilt / "base/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git-lfs pointers instead of files, such as model.safetensors; run `git lfs pull`" in said([spoilt / "base"])
    (spoilt / "base/model.safetensors").rename(spoilt / "base/pytorch_model.bin")
    (spoilt / "base/pytorch_model.bin").write_bytes(bytes(2000))
    assert "a format that can run code; save them as safetensors" in said([spoilt / "base"])
    assert "is a .bin file" in said([spoilt / "base/pytorch_model.bin"])
    assert "is a .json file, which is no model by itself; name its folder" in said([spoilt / "base/config.json"])


def test_encoders_are_no_members(whole, tmp_path):
    from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 424, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    wide = BertConfig(**small, num_attention_heads=2, initializer_range=0.5)  # as if trained: what comes later matters
    BertLMHeadModel(wide).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(T5Config(vocab_size=424, d_model=16, d_ff=16, num_layers=1)).save_pretrained(
        tmp_path / "t5"
    )
    for name, words in (("bert", "is an encoder (bert)"), ("t5", "is an encoder-decoder (t5)")):
        shutil.copy(whole / "base/tokenizer.json", tmp_path / name)
        assert words in said([tmp_path / name])


@pytest.mark.parametrize("models", [None, 5, b"base", 1.5, {"base": 1}, True], ids=str)
def test_what_names_no_model(models):
    with pytest.raises(LoadError):
        Pack.load(models)
    with pytest.raises(LoadError, match=r"models\[0\]"):
        Pack.load([models])


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"text": ' + b"[" * 50_000,
        b'{"text": "a", "domain": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        b'{"question": ' + b"[" * 50_000 + b"]" * 50_000 + b', "answer": 1}',
        b'{"text": [[["a"]]]}',
        b'{"text": {"text": "a"}}',
        b'{"text": 1' + b"0" * 5000 + b"}",
        b'{"text": "\\ud800"}',
        b"\xff\xfe",
        b"null",
        b"NaN",
    ],
    ids=lambda line: line[:14].decode("latin1"),
)
@pytest.mark.parametrize("read", [read_documents, read_questions])
def test_odd_rows_are_refused_by_line(tmp_path, caplog, line, read):
    good = b'{"text": "a", "question": "b", "choices": ["c", "d"], "answer": 0}'
    file = tmp_path / "rows.jsonl"
    file.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(DataError, match=r"rows.jsonl line 2: .*; correct it, or skip bad rows"):
        read(file)
    assert len(read(file, bad="skip")) == 2
