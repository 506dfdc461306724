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
from packllm.engines.transformers.merged_adapters import merge
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


def test_a_name_that_is_too_long_for_a_file():
    assert "cannot load model 'xxx" in refused("x" * 5000)


@pytest.mark.parametrize(
    ("spec", "engine"),
    [
        ("vllm:foo", "vllm"),
        ("mlx:org/model", "mlx"),
        ("a=exl2:./folder", "exl2"),
        ("hf://org/model", "hf"),
        ("file:///models/x.safetensors", "file"),
        ("org/base+vllm:adapter", "vllm"),
        ("tensorrt-llm:x", "tensorrt-llm"),
    ],
)
def test_unknown_engine(spec, engine):
    said = refused(spec)
    assert f"names no engine that there is: {engine!r}" in said
    assert "give a hub id, a folder, a .gguf file" in said


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
        ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}),
        ("llama", {"target_modules": r".*\.(q_proj|o_proj)", "exclude_modules": ["layers.0.self_attn.q_proj"]}),
        ("llama", {"fan_in_fan_out": True}),
        # More than plain LoRA: through peft.
        ("llama", {"use_dora": True}),
        ("llama", {"use_dora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"^model.layers.0.*q_proj": 9}}),
        ("llama", {"modules_to_save": ["lm_head", "norm"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"trainable_token_indices": [5, 60]}),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
        ("gpt2", {"target_modules": ["lm_head"]}),  # tied to the embedding, which it leaves alone
        ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 60]}),  # these change the head too
    ],
    ids=str,
)
def test_adapters_of_every_kind_equal_pefts_own(make_member, tmp_path, architecture, settings):
    member = make_member(architecture)
    torch.manual_seed(4)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    )
    trained = peft.get_peft_model(copy.deepcopy(member.model), config)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    trained.save_pretrained(tmp_path)
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


def changed(folder: Path, tmp_path: Path, config: dict | None = None, tensors: dict | None = None) -> Path:
    """A copy of an adapter with other settings or tensors; None takes one away."""
    copied = Path(shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True))
    file = copied / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    weights = {**load_file(folder / "adapter_model.safetensors"), **(tensors or {})}
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, copied / "adapter_model.safetensors")
    return copied


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{Q}A.weight": torch.ones(4, 1)}, "layers.1.self_attn.q_proj is of size 32 x 1, the base's weight 32 x 32"),
        ({f"{Q}B.weight": torch.ones(1, 4)}, "layers.1.self_attn.q_proj is of size 1 x 32, the base's weight 32 x 32"),
        ({f"{Q}A.weight": torch.ones(1, 32)}, "factors of model.layers.1.self_attn.q_proj"),
        ({f"{Q}A.weight": torch.ones(1, 32), f"{Q}B.weight": torch.ones(32, 1)}, "its rank 4"),
        ({f"{Q}A.weight": torch.ones(32)}, "factors of model.layers.1.self_attn.q_proj"),
        ({f"{Q}A.weight": torch.full((4, 32), torch.nan)}, "layers.1.self_attn.q_proj.lora_A.weight has NaN"),
        ({f"{Q}B.weight": torch.full((32, 4), torch.inf)}, "layers.1.self_attn.q_proj.lora_B.weight has NaN or inf"),
        ({f"{Q}B.weight": None}, "lacks model.layers.1.self_attn.q_proj.lora_B.weight"),
        ({Q.replace("1", "7") + part + ".weight": torch.ones(4, 4) for part in "AB"}, "layers.7.self_attn.q_proj"),
        ({"base_model.model.model.norm.weight_of_another": torch.ones(4)}, "norm.weight_of_another"),
    ],
    ids=["A 1 wide", "B 1 high", "A 1 high", "rank", "A flat", "NaN", "inf", "no B", "no such module", "unknown"],
)
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "beside its base"])
def test_an_adapters_tensors_are_held_against_its_base(base, adapted, tmp_path, tensors, said, shared):
    spec = f"{base}+{changed(adapted[0], tmp_path, tensors=tensors)}"
    with pytest.raises(LoadError) as caught:
        Loader().members([base, spec] if shared else [spec])
    assert said in str(caught.value)
    assert str(tmp_path / "changed") in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern has the pattern '(a+)+$', which is too complex"),
        ({"alpha_pattern": {"(.*.*)*x": 3}}, "too complex"),
        ({"rank_pattern": {"(x|x)(x|x)(x|x)(x|x)y": 3}}, "rank_pattern has"),
        ({"alpha_pattern": {"a?" * 40 + "a" * 40: 3}}, "too complex"),
        ({"alpha_pattern": {"[": 3}}, "cannot load adapter"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": "6"}, "lora_alpha='6'"),
        ({"r": 0}, "rank"),
        ({"alpha_pattern": {"q_proj": True}}, "lora_alpha=True"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"use_something_new": True}, "use_something_new"),
        ({"peft_type": "NO_SUCH"}, "cannot load adapter"),
        ({"peft_type": "IA3"}, "cannot load adapter"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_followed_are_refused_by_name(base, adapted, tmp_path, config, said):
    assert said in refused(f"{base}+{changed(adapted[0], tmp_path, config)}")


def test_an_adapter_alone_is_put_on_its_base(base, adapted, tmp_path):
    spec = changed(adapted[0], tmp_path, {"base_model_name_or_path": str(base)})
    members = Loader().members([spec, base])
    assert [member.name for member in members] == ["changed", "Tiny-1.7B"]
    assert members[0].engine is members[1].engine
    assert (logits(members[0].merged()) - adapted[1]).abs().max() < 1e-4
    for gone in ("./no/such/base", None, 5):
        spec = changed(adapted[0], tmp_path, {"base_model_name_or_path": gone})
        assert f"is an adapter, and its base {gone!r} is not on this machine; name it: BASE+" in refused(spec)
    shutil.copy(base / "model.safetensors", spec)
    assert "contains a model and an adapter" in refused(spec)


def enlarged(base: Path, folder: Path, **settings) -> torch.Tensor:
    """Save an adapter trained with one more token; logits of its model."""
    (member,) = Loader().members([base])
    tokenizer = copy.deepcopy(member.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<note>"]})
    torch.manual_seed(2)
    member.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings)
    tuned = peft.get_peft_model(member.model, config)
    tuned.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return logits(tuned.eval())


@pytest.mark.parametrize("settings", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}], ids=["to save", "auto"])
def test_an_adapter_with_more_tokens_enlarges_its_base(base, tmp_path, settings):
    expected = enlarged(base, tmp_path / "more", **settings)
    plain, more = Loader().members([base, f"{base}+{tmp_path / 'more'}"])
    assert (logits(more.model) - expected).abs().max() < 1e-4
    assert more.tokenizer.convert_tokens_to_ids("<note>") == more.vocabulary_size - 1 == plain.vocabulary_size
    assert plain.model.config.vocab_size == 424


def test_an_adapter_of_more_rows_without_their_embedding_is_refused(base, adapted, tmp_path):
    head = {
        f"base_model.model.lm_head.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (4, 32)), ("B", (425, 4)))
    }
    text = refused(f"{base}+{changed(adapted[0], tmp_path, tensors=head)}")
    assert "lm_head is of size 425 x 32, the base's weight 424 x 32" in text


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adapter_brings_its_template(base, adapted, tmp_path, where):
    folder = changed(adapted[0], tmp_path)
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (folder / where).write_text(template if where.endswith("jinja") else json.dumps({"chat_template": template}))
    plain, expert = Loader().members([base, f"{base}+{folder}"])
    assert expert.encoder.template == template != plain.encoder.template
    assert expert.engine is plain.engine


# Models in memory, and words for transformers


def test_models_in_memory(make_member):
    from transformers import TextGenerationPipeline

    member = make_member("llama", 3)
    pipeline = TextGenerationPipeline(member.model, member.tokenizer)
    wanted = Pack([member], max_tokens=4).generate("The court").text
    for models in ([(member.model, member.tokenizer)], (member.model, member.tokenizer), [pipeline], pipeline):
        with Pack.load(models, max_tokens=4) as pack:
            assert pack.generate("The court").text == wanted
            assert pack.recipe is None
    names = [m.name for m in Pack.load([(member.model, member.tokenizer), member, pipeline]).members]
    assert len(set(names)) == 3
    for odd in (member.model, (member.model, None), (member.model, "x"), (None, member.tokenizer), (1, 2, 3)):
        with pytest.raises(LoadError, match=r"models\[0\]"):
            Pack.load([odd])


def test_words_for_transformers(base):
    pack = Pack.load([base], model_kwargs={"attn_implementation": "eager", "token": "secret"})
    assert pack.members[0].model.config._attn_implementation == "eager"
    assert pack.recipe["model_kwargs"] == {"attn_implementation": "eager"}
    with pytest.raises(OptionError, match=r"model_kwargs\['dtype'\] cannot be set; give it to Pack.load as dtype="):
        Pack.load([base], model_kwargs={"dtype": "float32"})
    for odd in ({"use_safetensors": False}, {5: 1}, "revision"):
        with pytest.raises(OptionError, match="model_kwargs"):
            Pack.load([base], model_kwargs=odd)
    for odd in ({"attn_implementation": "no_such"}, {"attn_implementaton": "eager"}, {"quantization_config": 5}):
        with pytest.raises(LoadError, match="cannot load model"):
            Pack.load([base], model_kwargs=odd)


def test_a_misspelt_argument_is_guessed(base):
    for name, near in (("dytpe", "dtype"), ("model_kwarg", "model_kwargs"), ("weigting", "weighting")):
        with pytest.raises(OptionError, match=f"unknown option '{name}'; did you mean '{near}'"):
            Pack.load([base], **{name: "auto"})
    from langchain_packllm import PackLLM
    from llama_index.llms.packllm import PackLLM as LlamaIndexPackLLM

    for face in (PackLLM, LlamaIndexPackLLM):
        with pytest.raises(ValueError, match="'temprature'; did you mean 'temperature'"):
            face(models=[str(base)], temprature=1)
        model = face(models=[str(base)], model_kwargs={"attn_implementation": "eager"})
        assert model.pack.members[0].model.config._attn_implementation == "eager"


def test_home(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(base.parent))
    assert [m.name for m in Loader().members(["~/Tiny-1.7B", "law=~/Tiny-1.7B"])] == ["Tiny-1.7B", "law"]
