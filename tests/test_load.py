"""Loading what users name: folders, LoRA adapters on them, GGUF files; and refusing what cannot be trusted."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from packllm import Pack
from packllm.engines.load import Loader
from packllm.engines.transformers.lora import merge
from packllm.errors import LoadError, OptionError, PackError

IDS = torch.tensor([[5, 60, 200, 7, 33, 34, 35]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def base(make_member, tmp_path_factory) -> Path:
    """A folder with a tiny Llama and its tokenizer, whose name has a dot."""
    folder = tmp_path_factory.mktemp("models") / "Tiny-1.7B"
    member = make_member("llama", 3)
    member.model.save_pretrained(folder)
    member.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(base, tmp_path) -> Path:
    """A copy of that folder, to be spoilt."""
    return Path(shutil.copytree(base, tmp_path / "broken"))


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """(folder of a LoRA adapter whose B is not zero, logits of the base with it, unmerged)."""
    torch.manual_seed(1)
    (member,) = Loader().members([base])
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(member.model, config).eval()
    folder = tmp_path_factory.mktemp("adapters") / "law.v2"
    model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(spec) -> str:
    with pytest.raises(LoadError) as caught:
        Loader().members([spec])
    assert isinstance(caught.value, PackError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders


def test_a_folder_comes_back_as_it_was(base, make_member):
    (member,) = Loader().members([base])
    original = make_member("llama", 3)
    assert torch.allclose(logits(member.model), logits(original.model), atol=1e-4)  # another kernel for attention
    weights = member.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in original.model.state_dict().items())
    assert member.vocabulary.same_as(make_member("llama", 3).vocabulary)
    assert member.encoder.template == make_member("llama", 3).encoder.template
    assert not member.model.training


def test_names(base, adapted, monkeypatch):
    adapter, _ = adapted
    specs = [base, f"law={base}", f"{base}+{adapter}", f"my.law={base}+{adapter}", f"{base}/"]
    names = [member.name for member in Loader().members(specs)]
    assert names == ["Tiny-1.7B", "law", "law.v2", "my.law", "Tiny-1.7B-2"]
    monkeypatch.chdir(base)
    assert Loader().members(["."])[0].name == "Tiny-1.7B"


def test_one_model_need_not_be_a_list(base):
    for models in (base, str(base)):
        assert [member.name for member in Pack.load(models).members] == ["Tiny-1.7B"]


def test_a_folder_with_plus_or_equals_in_its_name(base, tmp_path):
    for name in ("a+b", "a=b"):
        shutil.copytree(base, tmp_path / name)
        assert Loader().members([tmp_path / name])[0].name == name


def test_a_base_is_read_once(base, adapted):
    one, two = Loader().members([base, f"again={base}"])
    assert one.model is two.model
    assert one.encoder is two.encoder


def test_equal_names_get_numbers(make_member):
    one, two, three = (make_member("llama", seed, name="m") for seed in (0, 1, 2))
    other = make_member("gpt2", name="m-2")
    members = Loader().members([one, other, two, three])
    assert [member.name for member in members] == ["m", "m-2", "m-3", "m-4"]
    assert [member.model for member in members] == [one.model, other.model, two.model, three.model]
    assert [member.name for member in (one, two, three, other)] == ["m", "m", "m", "m-2"]  # the caller's own stay
    assert members[0] is one


def test_one_member_twice(make_member):
    member = make_member("llama", name="m")
    assert [m.name for m in Loader().members([member, member])] == ["m", "m-2"]
    assert member.name == "m"


def test_dtype(base):
    assert Loader(dtype="auto").members([base])[0].model.dtype == torch.float32
    assert Loader(dtype="bfloat16").members([base])[0].model.dtype == torch.bfloat16
    assert Loader(dtype=torch.float16).members([base])[0].model.dtype == torch.float16
    with pytest.raises(
        OptionError, match="dtype='float8' is unknown; valid: auto, fastest, float32, float16, bfloat16"
    ):
        Loader(dtype="float8")


# Refusals


@pytest.mark.parametrize("models", [[], ()])
def test_nothing_to_load(models):
    with pytest.raises(LoadError, match=r"models is empty; name at least one hub id, folder, .gguf file or base"):
        Loader().members(models)


@pytest.mark.parametrize(
    "spec", ["./nowhere", "/no/such/folder", "a/b/c", "", "x=/no/such/folder", "two words", "../no"]
)
def test_unknown_path(spec):
    path = spec.removeprefix("x=")
    assert f"model {path!r} does not exist; give a hub id, a folder, a .gguf file or base+adapter" in refused(spec)


def test_unknown_hub_id_offline():
    assert refused("nobody/nothing").startswith("cannot load model 'nobody/nothing': ")


def test_unknown_file():
    assert refused("missing.gguf") == "model file 'missing.gguf' does not exist"


def test_pickled_weights_are_refused(broken):
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    os.remove(broken / "model.safetensors")
    assert "safetensors" in refused(broken)


def test_code_beside_the_model_is_not_run(broken, tmp_path):
    (broken / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (broken / "config.json").write_text(json.dumps(config))
    assert refused(broken).endswith("trust_remote_code=True runs it")
    assert not (tmp_path / "ran").exists()


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"garbage" * 99), "cannot load model"),
        (lambda folder: (folder / "config.json").unlink(), "cannot load model"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'), "cannot load model"),
        (drop_weight, "lacks 1 of its weights, such as 'model.layers.1.mlp.up_proj.weight'"),
        (widen, "cannot load model"),
    ],
    ids=["weights", "no config", "config", "tokenizer", "missing weight", "shapes"],
)
def test_a_spoilt_folder(broken, spoil, said):
    spoil(broken)
    text = refused(broken)
    assert said in text
    assert str(broken) in text


# Adapters


def test_an_adapter_alone_is_merged_and_one_beside_its_base_is_attached(base, adapted):
    folder, expected = adapted
    loader = Loader()
    plain, attached = loader.members([base, f"{base}+{folder}"])
    assert attached.model is plain.model
    untouched = logits(Loader().members([base])[0].model)
    assert torch.equal(logits(plain.model), untouched)
    assert (logits(attached.merged()) - expected).abs().max() < 1e-4
    assert (expected - untouched).abs().max() > 0.1  # the adapter does something
    merged = loader.members([f"{base}+{folder}"])[0]  # not merged into what was attached before
    assert (logits(merged.model) - expected).abs().max() < 1e-4
    assert not any("lora" in name for name, _ in merged.model.named_modules())
    assert merged.merged() is merged.model


def test_a_pickled_adapter_is_refused(base, adapted, tmp_path):
    folder = Path(shutil.copytree(adapted[0], tmp_path / "adapter"))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    os.remove(folder / "adapter_model.safetensors")
    assert "has no adapter_model.safetensors; other formats can run code" in refused(f"{base}+{folder}")


def test_a_spoilt_adapter(base, adapted, tmp_path):
    folder = Path(shutil.copytree(adapted[0], tmp_path / "adapter"))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({f"other.{name}": weight for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    assert refused(f"{base}+{folder}").startswith(f"cannot load adapter {str(folder)!r}: Found missing adapter keys")
    (folder / "adapter_model.safetensors").write_bytes(b"garbage" * 99)
    assert refused(f"{base}+{folder}").startswith(f"cannot load adapter {str(folder)!r}: ")
    (folder / "adapter_config.json").unlink()
    assert refused(f"{base}+{folder}").startswith(f"cannot load adapter {str(folder)!r}: ")


def test_an_adapter_that_is_not_there(base):
    assert "model './no/adapter' does not exist" in refused(f"{base}+./no/adapter")
    assert refused(f"{base}+nothing").startswith("cannot load adapter 'nothing': ")


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"use_rslora": True}),
        ("llama", {"alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 5}, "rank_pattern": {"v_proj": 2}}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("llama", {"use_dora": True}),  # more than plain LoRA: through peft
    ],
)
def test_adapters_of_every_kind_equal_pefts_own(make_member, tmp_path, architecture, settings):
    member = make_member(architecture)
    torch.manual_seed(4)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    )
    peft.get_peft_model(copy.deepcopy(member.model), config).save_pretrained(tmp_path)
    unmerged = peft.PeftModel.from_pretrained(copy.deepcopy(member.model), tmp_path)
    merged = merge(member.model, str(tmp_path))
    assert (logits(merged) - logits(unmerged)).abs().max() < 1e-4
    assert (logits(merged) - logits(member.model)).abs().max() > 0.1


def test_what_an_adapter_leaves_alone_is_shared(base, adapted):
    loader = Loader()
    plain, expert = loader.members([base])[0], loader.members([f"{base}+{adapted[0]}"])[0]
    shared = {p.data_ptr() for p in plain.model.parameters()} & {p.data_ptr() for p in expert.model.parameters()}
    changed = 2 * 3  # layers, target modules
    assert len(shared) == len(list(plain.model.parameters())) - changed
