"""Linear layers in a second layout: the same answers, from the second copy, whose bytes are told before."""

from __future__ import annotations

import copy

import pytest
import torch

import packllm
from langchain_packllm import PackLLM as LangChainLLM
from llama_index.llms.packllm import PackLLM as LlamaIndexLLM
from packllm import LoadError, Member, OptionError, Pack
from packllm.engines.base import Read
from packllm.engines.transformers.adapters import Adapters
from packllm.engines.transformers.engine import Engine
from packllm_eval.tiny import byte_tokenizer, tiny_model

KINDS = ("llama", "gpt2", "qwen2", "gemma3_text", "bloom", "mixtral", "mamba")  # Conv1D, biases, tied heads, experts
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Insulin", "A hash index stores a 32-bit hash code."]

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def member_of(model) -> Member:
    return Member(model.eval(), byte_tokenizer(), "a")


def scores(member: Member, text: str) -> torch.Tensor:
    """Log-probabilities of a text's tokens, read in one pass."""
    ids = member.encoder.plain(text)
    (answer,) = member.engine.read([Read(member.open(), ids, [*ids[1:], -1])])
    assert isinstance(answer, torch.Tensor)
    return answer[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_the_plain_layout(kind):
    model = tiny_model(kind)
    plain, packed = member_of(model), member_of(copy.deepcopy(model))
    packed.engine.prepack()
    for text in TEXTS:
        assert (scores(packed, text) - scores(plain, text)).abs().max() < 1e-4
    options = {"max_tokens": 16, "chat_template": False}
    expected = [answer.text for answer in Pack([plain], **options).generate_batch(TEXTS)]
    pack = Pack([packed], **options)
    assert [pack.generate(text).text for text in TEXTS] == expected
    assert [answer.text for answer in pack.generate_batch(TEXTS)] == expected


def test_passes_over_several_tokens_use_the_second_copy():
    member = member_of(tiny_model("llama"))
    expected = scores(member, TEXTS[0])
    member.engine.prepack()
    member.model.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert (scores(member, TEXTS[0]) - expected).abs().max() < 1e-4  # the plain weight is not looked at
    (row,) = member.engine.read([Read(member.open(), [5], "last")])
    with torch.inference_mode():
        logits = member.model(input_ids=torch.tensor([[5]])).logits[0, -1]
    assert isinstance(row, torch.Tensor)
    assert (row[0] - logits[: row.shape[-1]].log_softmax(-1))[:200].abs().max() < 1e-4  # one token: it is


def test_adapters_of_one_base():
    def pair(prepacked: bool) -> list[Member]:
        model, tokenizer = tiny_model("llama"), byte_tokenizer()
        base = Member(model.eval(), tokenizer, "base")
        engine = base.engine
        assert isinstance(engine, Engine)
        engine.adapters = Adapters(model)
        torch.manual_seed(1)
        size = model.config.hidden_size
        name = "model.layers.0.self_attn.q_proj"
        index = engine.adapters.attach({name: (torch.randn(2, size), torch.randn(size, 2))})
        if prepacked:
            engine.prepack()
        return [base, Member(model, tokenizer, "expert", base.encoder, engine=engine, adapter=index)]

    options = {"max_tokens": 16, "chat_template": False, "weighting": {"base": 0.5, "expert": 0.5}}
    expected = [answer.text for answer in Pack(pair(False), **options).generate_batch(TEXTS)]
    assert [answer.text for answer in Pack(pair(True), **options).generate_batch(TEXTS)] == expected
    merged = pair(True)[1].merged()  # a copy, which the second layout of its base does not reach
    alone = Member(merged, byte_tokenizer(), "merged")
    assert (scores(alone, TEXTS[0]) - scores(pair(False)[1], TEXTS[0])).abs().max() < 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def test_its_bytes_are_told_before_and_after(folder):
    plain, packed = Pack.load([folder]), Pack.load([folder], prepack=True)
    layers = [module.weight for module in plain.members[0].model.modules() if isinstance(module, torch.nn.Linear)]
    linear = sum(4 * weight.numel() for weight in {id(weight): weight for weight in layers}.values())
    sizes = [pack.memory()[0][1] for pack in (plain, packed)]
    assert sizes[1] - sizes[0] == linear
    estimates = [packllm.estimate([folder], prepack=prepack).weights for prepack in (False, True)]
    assert estimates[1] - estimates[0] == linear
    with pytest.raises(LoadError, match="more than max_memory"):
        Pack.load([folder], prepack=True, max_memory=estimates[1] - 1)


def test_every_face_loads_it_and_loads_it_again(folder):
    pack = Pack.load([folder], prepack=True)
    assert pack.recipe is not None
    assert pack.recipe["prepack"] is True
    for llm in (LangChainLLM(models=[folder], prepack=True), LlamaIndexLLM(models=[folder], prepack=True)):
        assert llm.pack.recipe == pack.recipe
        assert "prepack" not in (type(llm)(models=[folder]).pack.recipe or {})


def test_where_it_cannot_be(folder):
    with pytest.raises(
        LoadError, match="float32 on a CPU; LlamaForCausalLM has none; leave it out, or give dtype='float32'"
    ):
        Pack.load([folder], dtype="bfloat16", prepack=True)
    with pytest.raises(OptionError, match="prepack are for transformers"):
        Pack.load([folder], engine="llama.cpp", prepack=True)


def test_arguments_that_are_on_or_off_may_be_words(folder):
    """As `packllm ask --option` gives them."""
    assert Pack.load([folder], prepack="true").recipe["prepack"] is True
    assert "prepack" not in (Pack.load([folder], prepack="false").recipe or {})
    assert Pack.load([folder], trust_remote_code="false").recipe["trust_remote_code"] is False
    for name in ("prepack", "trust_remote_code"):
        with pytest.raises(OptionError, match=f"{name}='maybe' must be True or False"):
            Pack.load([folder], **{name: "maybe"})
