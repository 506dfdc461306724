"""GGUF files of LoRA adapters: the same rows as peft's folder of the same weights; what is faulty is refused by name
before llama.cpp sees it, for llama.cpp ends the process over some faults."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from engines import contract
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_batches import saved_experts
from test_gguf import write_gguf

import packllm
from packllm import LoadError, Pack
from packllm.engines.llama_cpp.native import VERSION, installed
from packllm.engines.load import Loader

if installed() != VERSION:
    pytest.skip(f"needs llama-cpp-python=={VERSION} (extra llama-cpp)", allow_module_level=True)

HEADS = {"attn_q": 4, "attn_k": 2}
Q, DOWN = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"
TEXT = "The court shall order relief. What is the capital of France?"


def factors_of(folder: Path) -> dict[str, np.ndarray]:
    """Of peft's folder, as llama.cpp's converter names and orders them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    found = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, _, role = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        name = names.get_name(module)
        if role == "B" and (heads := HEADS.get(name.split(".")[-1])):
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        found[f"{name}.weight.lora_{role.lower()}"] = tensor.numpy()
    return found


def write_adapter(path: Path, tensors: dict[str, np.ndarray], architecture="llama", alpha=6.0, **said) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    told = {"general.type": "adapter", "adapter.type": "lora", **said}
    for key, value in told.items():
        if isinstance(value, str):
            writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in said.items():
        if isinstance(value, list):
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        eight = gguf.GGMLQuantizationType.Q8_0 if tensor.dtype == np.uint8 else None
        writer.add_tensor(name, np.ascontiguousarray(tensor), raw_dtype=eight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def family(make_member, tmp_path_factory) -> Path:
    """base.gguf, peft's expert0 and expert1 (ranks 3 and 4, alpha 6), and the same in .gguf files."""
    folder = tmp_path_factory.mktemp("family")
    saved_experts(make_member("llama", 5), folder)
    write_gguf(make_member("llama", 5), folder / "base.gguf")
    for at in range(2):
        write_adapter(folder / f"expert{at}.gguf", factors_of(folder / f"expert{at}"))
    return folder


def rows(member, exact: bool = True) -> torch.Tensor:
    if exact:
        member.engine._context(member.adapter).kind = 0  # keys and values in 32 bits
    return contract.read(member.open(), member.encoder.plain(TEXT))


def test_a_file_and_a_folder_of_the_same_weights(family):
    base = family / "base.gguf"
    specs = [str(base), *(f"{base}+{family / name}" for name in ("expert0", "expert0.gguf", "expert1", "expert1.gguf"))]
    members = Loader(engine="llama.cpp").members(specs)
    assert [member.name for member in members] == ["base", "expert0", "expert0-2", "expert1", "expert1-2"]
    assert len({id(member.engine) for member in members}) == 1
    plain, *found = [rows(member) for member in members]
    for folder, file in (found[:2], found[2:]):
        contract.assert_close(file, folder)
        assert (file - plain).abs().max() > 0.1
    pack = Pack.load([f"base={base}", f"law={specs[2]}"], engine="llama.cpp", max_tokens=8)
    other = Pack.load([f"base={base}", f"law={specs[1]}"], engine="llama.cpp", max_tokens=8)
    assert pack.generate(TEXT).text == other.generate(TEXT).text


@pytest.mark.parametrize("kind", ["float16", "Q8_0"])
def test_smaller_numbers_stay_as_they_are(family, tmp_path, kind):
    """Half and 8 bits: near the full ones, and as many bytes as in the file."""
    tensors = factors_of(family / "expert0")
    less = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    if kind == "Q8_0":  # of the factors whose rows are long enough
        tensors = {name: one for name, one in tensors.items() if "attn_q" in name}
        first = f"{Q}.lora_a"
        less = {**tensors, first: gguf.quantize(tensors[first], gguf.GGMLQuantizationType.Q8_0)}
    write_adapter(tmp_path / "full.gguf", tensors)
    write_adapter(tmp_path / "less.gguf", less)
    specs = [f"{family / 'base.gguf'}+{tmp_path / name}.gguf" for name in ("full", "less")]
    pack = Pack.load(specs, engine="llama.cpp")
    full, near = (rows(member) for member in pack.members)
    assert 0 < (full - near).abs().mean() < 0.05
    assert packllm.estimate(specs, engine="llama.cpp").weights == sum(held for _, held, _ in pack.memory())
    assert pack.memory()[1][1] == sum(tensor.nbytes for tensor in less.values())


def test_memory_is_what_was_estimated(family):
    base = family / "base.gguf"
    for specs in (
        [str(base), f"{base}+{family / 'expert0'}", f"{base}+{family / 'expert1.gguf'}"],
        [f"{base}+{family / 'expert0'}"],
        [f"{base}+{family / 'expert0.gguf'}"],
    ):
        pack = Pack.load(specs, engine="llama.cpp")
        assert list(packllm.estimate(specs, engine="llama.cpp")) == pack.memory()
    own = sum(tensor.nbytes for tensor in factors_of(family / "expert0").values())
    assert pack.memory()[0][1] == pack.members[0].engine.size + own


# Faults


def refused(base: Path, adapter: Path) -> str:
    with pytest.raises(LoadError) as caught:
        Loader(engine="llama.cpp").members([f"{base}+{adapter}"])
    assert "\n" not in str(caught.value)
    assert adapter.name in str(caught.value)
    return str(caught.value)


def spoilt(tensors: dict[str, np.ndarray], fault: str) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    one = dict(tensors)
    if fault == "lacks":
        del one[f"{Q}.lora_b"]
    if fault == "layer":
        one["blk.9.attn_q.weight.lora_a"], one["blk.9.attn_q.weight.lora_b"] = (one[f"{Q}.lora_{r}"] for r in "ab")
    if fault == "size":
        one[f"{DOWN}.lora_a"] = np.ones((3, 64), np.float32)
    if fault == "rank":
        one[f"{DOWN}.lora_a"] = np.ones((2, 48), np.float32)
    if fault == "rows":
        one[f"{Q}.lora_b"] = np.ones((34, 3), np.float32)
    if fault == "vector":
        one[f"{Q}.lora_a"] = np.ones(32, np.float32)
    if fault == "norm":
        one["blk.0.attn_norm.weight"] = np.ones(32, np.float32)
    if fault == "integers":
        one[f"{Q}.lora_a"] = np.ones((3, 32), np.int8)
    if fault == "nan":
        one[f"{Q}.lora_a"] = np.full((3, 32), np.nan, np.float32)
    said = {
        "architecture": {"architecture": "qwen2"},
        "type": {"adapter.type": "control_vector"},
        "invoked": {"adapter.alora.invocation_tokens": [1, 2]},
        "alpha": {"alpha": float("nan")},
    }.get(fault, {})
    return ({} if fault == "empty" else one), said


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("lacks", f"it lacks {Q}.lora_b"),
        ("layer", "it changes blk.9.attn_q.weight, which its base lacks; is it of another model?"),
        ("size", f"its update of {DOWN} is of size 32 x 64, the base's weight 32 x 48; is it of another model?"),
        ("rows", f"its update of {Q} is of size 34 x 32, the base's weight 32 x 32; is it of another model?"),
        ("rank", f"its factors of {DOWN} are of size 2 x 48 and 32 x 3: the ranks differ"),
        ("vector", f"its tensor '{Q}.lora_a' is of size 32"),
        ("norm", "its tensor 'blk.0.attn_norm.weight' is no factor of an update"),
        ("integers", f"its tensor '{Q}.lora_a' is of type I8; F32, F16, Q8_0, BF16 can be used"),
        ("nan", f"{Q}.lora_a holds NaN or infinity"),
        ("empty", "it holds no weights"),
        ("architecture", "it is for models of architecture 'qwen2', and its base is 'llama'"),
        ("type", "it is of the type 'control_vector'; llama.cpp runs 'lora' alone"),
        ("invoked", "it is an activated LoRA (aLoRA), which applies only after certain tokens; it is not supported"),
        ("alpha", "adapter.lora.alpha=nan is no number"),
    ],
)
def test_a_faulty_adapter_is_refused_by_name(family, tmp_path, fault, told):
    tensors, said = spoilt(factors_of(family / "expert0"), fault)
    write_adapter(tmp_path / "x.gguf", tensors, **said)
    assert told in refused(family / "base.gguf", tmp_path / "x.gguf")


def test_a_model_is_no_adapter_and_an_adapter_no_model(family, tmp_path):
    base, expert = family / "base.gguf", family / "expert0.gguf"
    assert "it is no adapter but a model" in refused(base, base)
    for engine in ("llama.cpp", "transformers"):
        with pytest.raises(LoadError, match=rf"it is an adapter; name the model that it is for: BASE\.gguf\+{expert}"):
            Loader(engine=engine).members([expert])
        with pytest.raises(LoadError, match="it is an adapter"):
            packllm.estimate([expert], engine=engine)
    for wrong in (f"{base}+{expert}", f"{family / 'base'}+{expert}"):
        with pytest.raises(LoadError, match=r"expert0\.gguf'.*run in llama\.cpp alone"):
            Loader(engine="transformers").members([wrong])
    with pytest.raises(LoadError, match=r"expert0\.gguf'.*run in llama\.cpp alone"):
        Loader().members([f"{family / 'base'}+{expert}"])
    with pytest.raises(LoadError, match="it is no adapter but a model"):
        packllm.estimate([f"{base}+{base}"], engine="llama.cpp")
    write_adapter(tmp_path / "vision.gguf", factors_of(family / "expert0"), **{"general.type": "mmproj"})
    with pytest.raises(LoadError, match="it is no model: it says that it is of the type 'mmproj'"):
        Loader(engine="llama.cpp").members([tmp_path / "vision.gguf"])


def test_spoilt_adapters_never_end_the_process(family, tmp_path):
    """Cut anywhere, or with a number of the header changed: run as they are, or refused."""
    content, outcomes = (family / "expert0.gguf").read_bytes(), set()
    names = content.index(b"blk.0.ffn_down.weight.lora_b")  # the last name is near the header's end
    numbers = st.sampled_from([0, 1, 2, 6, 12, 2**31, 2**32 - 1]).map(lambda n: struct.pack("<I", n))
    cuts = st.integers(0, len(content) - 1).map(lambda end: content[:end])
    changes = st.builds(lambda at, new: content[:at] + new + content[at + 4 :], st.integers(0, names + 60), numbers)
    path, loader = tmp_path / "x.gguf", Loader(engine="llama.cpp")  # one, so that the base is read once

    @settings(max_examples=80, derandomize=True, deadline=None)
    @given(cuts | changes)
    def run(spoilt: bytes) -> None:
        path.write_bytes(spoilt)
        try:
            (member,) = loader.members([f"{family / 'base.gguf'}+{path}"])
        except LoadError as error:
            outcomes.add("x.gguf" in str(error) or str(error))
        else:
            outcomes.add(bool(rows(member).isfinite().any()) and "run")

    run()
    assert outcomes == {True, "run"}


def test_an_adapter_of_a_model_in_parts(family, tmp_path, make_member):
    """Whose weights are in later parts."""
    write_gguf(make_member("llama", 5), tmp_path / "base.gguf", split_max_tensors=8)
    (part, *_) = sorted(tmp_path.glob("*.gguf"))
    whole, *others = Loader(engine="llama.cpp").members(
        [
            f"{family / 'base.gguf'}+{family / 'expert0'}",
            f"{part}+{family / 'expert0'}",
            f"{part}+{family / 'expert0.gguf'}",
        ]
    )
    for other in others:
        contract.assert_close(rows(other), rows(whole))


def test_the_starters_experts_count(request):
    from packllm import starter

    if starter.base_file() is None:
        pytest.skip(starter.WEIGHTS)
    pack = Pack.starter(engine="llama.cpp")
    told, found = pack.memory(), packllm.estimate(starter.specs("llama.cpp"), engine="llama.cpp")
    assert list(found) == told
    assert all(weights > 2**24 for _, weights, _ in told[1:])
    assert json.dumps(found.as_dict())
    assert os.path.getsize(starter.base_file()) == pytest.approx(told[0][1], rel=0.05)
