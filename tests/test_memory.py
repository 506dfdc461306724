"""Memory before loading, against what loading then takes."""

from __future__ import annotations

import json
import os
import struct

import peft
import pytest
import torch
from conftest import TEMPLATE, byte_level_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import packllm
from packllm import LoadError, OptionError, Pack
from packllm.cli import app
from packllm.engines.base import Read
from packllm.engines.load import Loader
from packllm.engines.memory import bytes_of
from packllm.engines.transformers import kv
from packllm.machine import free_memory
from packllm_eval.tiny import byte_tokenizer, tiny_model

FAMILIES = {
    "llama": "float32",
    "gpt2": "float32",
    "mistral": "bfloat16",  # looks back a few tokens, and is packed: all are kept
    "qwen3_next": "float32",  # recurrent states beside attention
    "deepseek_v3": "bfloat16",  # MLA, mixture of experts
    "gemma3_text": "float16",  # windows in some layers, tied embeddings
    "gemma3n_text": "float32",
    "gemma4_text": "float32",  # sizes that differ between layers
    "falcon_h1": "float32",
    "bloom": "bfloat16",
    "gpt_oss": "bfloat16",
    "mamba2": "float32",
    "exaone4": "float32",
    "phi3": "float16",
    "aya_vision": "float32",  # what reads images is left out
}
TOKENS = 96


def save(model, folder, dtype="float32", tokenizer=None) -> str:
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return str(folder)


def taken(member) -> tuple[int, int]:
    """Bytes of a loaded member's weights, and of its cache after TOKENS tokens."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*member.model.parameters(), *member.model.buffers()]}
    sequence = member.open()
    (answer,) = member.engine.read([Read(sequence, [at % 200 for at in range(TOKENS)], "none")])
    assert not isinstance(answer, Exception)
    cache = sum(tensor.numel() * tensor.element_size() for tensor in kv.tensors(sequence.cache))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_is_what_loading_takes(family, tmp_path):
    folder = save(tiny_model(family), tmp_path / "model", FAMILIES[family])
    loader = Loader()
    footprint = loader.footprint(loader.spec(folder))
    found = packllm.estimate(folder)
    pack = Pack.load(folder)
    weights, cache = taken(pack.members[0])
    assert found[0] == ("model", footprint.weights, footprint.cache.token_bytes)
    assert found.weights == pytest.approx(weights, rel=0.02)
    assert footprint.cache.after(TOKENS) == pytest.approx(cache, rel=0.02)
    assert footprint.parameters == sum(parameter.numel() for parameter in pack.members[0].model.parameters())
    assert pack.memory() == list(found)


def test_a_model_of_sixteen_gigabytes_takes_no_memory_to_look_at(tmp_path):
    """The shape of Llama 3 8B: a header, and a file that is a hole."""
    size = 2 * 8_030_261_248 + 512  # the rotary frequencies, in float32
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {
            name: list(weight.shape) for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(torch.Size(shape).numel())
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    before = resident()
    found = packllm.estimate([tmp_path, tmp_path])
    assert resident() - before < 2**30
    assert found[0] == (tmp_path.name, size, 131_072)
    assert found[1] == (f"{tmp_path.name}-2", 0, 131_072)  # the same base, once
    assert found.members[0].window_bytes == 131_072 * 131_072 == 16 * 2**30
    assert found.members[0].parameters == 8_030_261_248
    assert "its tokenizer cannot be read" in str(found)
    single = packllm.estimate(tmp_path, dtype="float32")
    assert single[0] == (tmp_path.name, 2 * size - 512, 2 * 131_072)
    (tmp_path / "model.safetensors").unlink()
    alone = packllm.estimate(tmp_path)
    assert alone.weights == size
    assert "from its config alone" in alone.members[0].note


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def family(make_member, tmp_path) -> list[str]:
    """A base, two plain adapters of it, and one that peft merges into a copy."""
    member = make_member("llama", 5)
    base = save(member.model, tmp_path / "base", tokenizer=member.tokenizer)
    found = [base]
    for at, settings in enumerate(({"r": 4}, {"r": 2}, {"r": 4, "use_dora": True})):
        copy = AutoModelForCausalLM.from_pretrained(base)
        config = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"], **settings)
        peft.get_peft_model(copy, config).save_pretrained(tmp_path / f"expert{at}")
        found.append(f"{base}+{tmp_path / f'expert{at}'}")
    return found


@pytest.mark.parametrize("which", [[0], [1], [3], [0, 1, 2], [1, 2], [0, 3], [0, 1, 3]])
def test_what_adapters_share_counts_once(which, family):
    specs = [family[at] for at in which]
    found, pack = packllm.estimate(specs), Pack.load(specs)
    told = pack.memory()
    assert [name for name, *_ in found] == [name for name, *_ in told]
    assert found.weights == pytest.approx(sum(weights for _, weights, _ in told), rel=0.1)
    assert [token for *_, token in found] == [token for *_, token in told]
    tensors = {}
    for member in pack.members:
        stacks = member.engine.adapters._stacks.values() if member.engine.adapters else ()
        for tensor in [
            *member.model.parameters(),
            *member.model.buffers(),
            *(part for pair in stacks for part in pair),
        ]:
            tensors[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    assert sum(weights for _, weights, _ in told) == pytest.approx(sum(tensors.values()), rel=0.02)


def test_whether_members_share_vocabulary_template_and_end(make_member, tmp_path):
    word, byte = make_member("llama", 0, "words"), make_member("llama", 0)
    words = save(word.model, tmp_path / "words", tokenizer=word.tokenizer)
    first = save(byte.model, tmp_path / "bytes", tokenizer=byte.tokenizer)
    renamed = byte_level_tokenizer()
    renamed.chat_template = TEMPLATE.replace("assistant", "bot")
    renamed.eos_token = "<|endoftext|>"
    second = save(byte.model, tmp_path / "second", tokenizer=renamed)

    def shared(*folders: str) -> tuple:
        found = packllm.estimate(folders)
        return found.vocabulary, found.template, found.end

    assert shared(first, first) == (True, True, True)
    assert shared(first, words) == (False, False, False)
    assert shared(first, second) == (True, False, False)
    assert shared(first, "nobody/nothing") == (None, None, None)
    assert "vocabulary: one; chat template: several; end of answers: several." in str(packllm.estimate([first, second]))


def test_what_is_not_here_is_said(family):
    found = packllm.estimate(["nobody/nothing", family[0]])
    assert found[0] == ("nothing", None, None)
    assert "it is not downloaded, so its size is unknown" in found.members[0].note
    assert found.weights == found[1][1] > 0
    for wrong in ("/no/such/folder", "absent.gguf"):
        with pytest.raises(LoadError, match="does not exist"):
            packllm.estimate(wrong)
    with pytest.raises(LoadError, match=r"the size of 'nothing' is unknown(.|\n)*member"):
        Pack.load(["nobody/nothing"], max_memory="8GiB")


def test_more_than_max_memory_is_refused_before_loading(family, monkeypatch):
    size = packllm.estimate(family[:3]).weights
    pack = Pack.load(family[:3], max_memory=size)
    assert pack.recipe["max_memory"] == size
    assert len(Pack.load(family[:3], max_memory="1GiB").members) == 3
    monkeypatch.setattr("packllm.engines.transformers.files.read", None)  # nothing is loaded
    with pytest.raises(LoadError) as caught:
        Pack.load(family[:3], max_memory=size - 1)
    assert "max_memory=" in str(caught.value)
    assert all(name in str(caught.value) for name in ("base", "expert0", "expert1", "together", "cache/token"))


def test_sizes_are_read_as_people_write_them():
    assert [bytes_of(text) for text in (5, "5", "8GiB", "1.5 GiB", "2gb", "512MB", "1k")] == [
        *(5, 5, 8 * 2**30, 3 * 2**29, 2 * 10**9, 512 * 10**6, 1000)
    ]
    assert bytes_of(None) is bytes_of({"cpu": "1GiB"}) is None
    for wrong in (0, -1, True, 1.5, "much", "GiB", "-1GiB", "0"):
        with pytest.raises(OptionError, match="max_memory="):
            Pack.load(["nobody/nothing"], max_memory=wrong)


def test_a_mapping_goes_to_accelerate(family, tmp_path):
    whole = Pack.load(family[0], max_memory={"cpu": "1GiB"})
    assert whole.memory()[0][1] == packllm.estimate(family[0]).weights
    words = {"offload_folder": str(tmp_path / "offloaded")}
    pack = Pack.load(family[0], max_memory={"cpu": "100KB"}, model_kwargs=words)
    assert "disk" in pack.members[0].model.hf_device_map.values()
    assert pack.generate("a", max_tokens=4).text == whole.generate("a", max_tokens=4).text


def test_the_command_line_tells_the_table(family):
    shown = CliRunner().invoke(app, ["check", f"general={family[0]}", family[1]], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].split() == [
        "member",
        "engine",
        "type",
        "parameters",
        "weights",
        "cache/token",
        "cache",
        "at",
        "window",
    ]
    assert lines[1].split()[:3] == ["general", "transformers", "float32"]
    assert "together" in lines[3]
    assert "vocabulary: one; chat template: one; end of answers: one." in shown.output
    told = json.loads(CliRunner().invoke(app, ["check", *family[:2], "--json"]).output)
    found = packllm.estimate(family[:2])
    assert [row["weights"] for row in told["members"]] == [weights for _, weights, _ in found]
    assert told["weights"] == found.weights
    assert told["fits"] is True
    assert CliRunner().invoke(app, ["check", "/no/such/model"]).exit_code == 2


@pytest.mark.real
def test_the_starter_pack(starter_pack):
    from packllm import starter

    assert list(packllm.estimate(starter.specs())) == starter_pack.memory()


def test_free_memory_heeds_control_groups(tmp_path):
    told = tmp_path / "meminfo"
    told.write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert free_memory(tmp_path, told) == 8000 * 1024
    second = tmp_path / "v2"
    second.mkdir()
    for name, text in (("max", "5000000\n"), ("current", "3000000\n"), ("stat", "anon 1\ninactive_file 500000\n")):
        (second / f"memory.{name}").write_text(text)
    assert free_memory(second, told) == 2_500_000
    (second / "memory.max").write_text("max\n")
    assert free_memory(second, told) == 8000 * 1024
    first = tmp_path / "memory"
    first.mkdir()
    for name, text in (("limit_in_bytes", "4000000"), ("usage_in_bytes", "4500000"), ("stat", "total_inactive_file 0")):
        (first / f"memory.{name}").write_text(text)
    assert free_memory(tmp_path, told) == 0
