"""Architectures: what a pack writes with each kind is what transformers writes, or it is refused with the reason."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from packllm import LoadError, Member, Pack
from packllm_eval.models import examine, table
from packllm_eval.tiny import VOCABULARY, byte_tokenizer, families, tiny_model

RIGHT = {
    "llama": "dense",
    "mixtral": "mixture of experts",
    "deepseek_v3": "mixture of experts",  # latent attention
    "deepseek_v4": "mixture of experts",  # layers of its own in the cache
    "gemma2": "sliding window",
    "gpt_neo": "sliding window",  # over a plain cache
    "gpt_oss": "sliding window, mixture of experts",
    "gpt_neox": "dense",  # its configuration says is_decoder=False, as an encoder's
    "bloom": "dense",  # counts positions by itself
    "qwen3_next": "linear attention, mixture of experts",
    "lfm2": "linear attention",  # convolutions alone: their caches roll back
    "mamba": "recurrent",
    "recurrent_gemma": "linear attention, sliding window",  # keeps its state in its modules
    "bamba": "linear attention",  # wrong without a mask
    "rwkv": "dense",  # an argument of its own
    "openai-gpt": "dense",  # no cache at all
    "qwen2_vl": "vision-language",
}
REFUSED = {
    "bert": "attends to later tokens",
    "xlnet": "attends to later tokens",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "blip": "does not run on tokens alone",
}


@pytest.mark.parametrize("family", RIGHT)
def test_a_pack_writes_what_transformers_writes(family):
    row = examine(family)
    assert row.kind == RIGHT[family]
    assert vars(row.checks) == dict.fromkeys(vars(row.checks), True), row


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_run_is_refused_at_load_with_the_reason(family):
    row = examine(family)
    assert row.note.startswith("refused: ")
    assert REFUSED[family] in row.note
    assert set(vars(row.checks).values()) == {None}


def test_the_table_counts_what_is_right_refused_and_wrong():
    rows = [examine("llama"), examine("bert")]
    rows[0].checks.drafts = False
    page = table(rows)
    assert "Of 2 families 0 write what they should in every way, 1 are refused at load, 1 differ somewhere." in page
    assert "| llama | dense | yes | yes | yes | **no** | yes |" in page
    assert len(families()) >= 40


TEXTS = ["The quick brown fox jumps over the lazy dog.", "Insulin", "A hash index stores a 32-bit hash code."]


def pack_of(*models, **options) -> Pack:
    members = [Member(model.eval(), byte_tokenizer(), name) for name, model in zip("ab", models, strict=False)]
    return Pack(members, max_tokens=16, weighting={member.name: 1 / len(members) for member in members}, **options)


def sized(kind, **settings):
    """A configuration of this class whose weights are wide."""
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return kind(vocab_size=VOCABULARY, initializer_range=0.5, **ends, **settings)


def anew(pack: Pack, text: str, count: int = 16) -> str:
    """What the first member writes, reading the whole text anew at every token."""
    member = pack.members[0]
    ids = pack.tokenize(text)
    written = []
    while len(written) < count:
        with torch.inference_mode():
            logits = member.model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1]
        token = int(member.real(logits).argmax())
        if token in member.end_ids:
            break
        written.append(token)
    return b"".join(map(member.vocabulary.text_bytes, written)).decode(errors="replace")


def phi3_model(switch: int):
    from transformers import Phi3Config, Phi3ForCausalLM

    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": switch, **factors}
    torch.manual_seed(0)
    return Phi3ForCausalLM(
        sized(
            Phi3Config,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            original_max_position_embeddings=switch,
            rope_parameters=scaling,
        )
    )


def test_positions_that_are_scaled_by_length_are_scaled_by_each_rows_own():
    model = phi3_model(switch=48)
    pack = pack_of(model, model)
    expected = [anew(pack, text) for text in TEXTS]  # the first and the last cross the switch while they are written
    assert [len(pack.tokenize(text)) for text in TEXTS] == [44, 7, 39]
    assert [pack.generate(text).text for text in TEXTS] == expected
    assert [answer.text for answer in pack.generate_batch(TEXTS, draft_tokens=4)] == expected
    long = " ".join(TEXTS)
    assert pack.generate(long).text == anew(pack, long)
    ids = torch.tensor([pack.tokenize(TEXTS[0])])
    with torch.inference_mode():
        theirs = model.generate(ids, do_sample=False, max_new_tokens=16, eos_token_id=257, pad_token_id=257)
    text = b"".join(map(pack.members[0].vocabulary.text_bytes, theirs[0, ids.shape[1] :].tolist()))
    assert text.decode(errors="replace") == expected[0]


def test_a_model_whose_state_is_kept_in_its_modules_serves_two_requests_in_turn():
    pack = pack_of(tiny_model("recurrent_gemma"))
    expected = [anew(pack, text, 8) for text in TEXTS]
    streams = [pack.stream(text, max_tokens=8) for text in TEXTS]
    answers = ["", "", ""]
    while streams:
        for at, stream in reversed(list(enumerate(streams))):
            if (chunk := next(stream, None)) is not None:
                answers[at] += chunk.text
        if chunk is None:
            break
    for at, stream in enumerate(streams):
        answers[at] += "".join(chunk.text for chunk in stream)
    assert answers == expected


def test_a_decoder_made_of_an_encoder_is_carried_when_it_is_one():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    blind = BertLMHeadModel(sized(BertConfig, **sizes)).eval()
    with pytest.raises(LoadError, match="attends to later tokens"):
        Member(blind, byte_tokenizer())
    pack = pack_of(BertLMHeadModel(sized(BertConfig, is_decoder=True, **sizes)))
    assert [pack.generate(text).text for text in TEXTS] == [anew(pack, text) for text in TEXTS]


def test_a_trial_is_run_once_a_kind_and_on_few_tokens():
    def model(seed):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(sized(GPT2Config, n_embd=32, n_layer=3, n_head=4, n_positions=128)).eval()

    read = []
    for seed in range(2):
        made = model(seed)
        made.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        Member(made, byte_tokenizer())
    assert 0 < len(read) <= 10
    assert sum(read) <= 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_pass_for_a_lost_state(dtype, caplog):
    """In half precision a model keeps every shortcut that it has in single precision, and loses those it has not."""
    with caplog.at_level(logging.WARNING, "packllm"):
        dense = pack_of(tiny_model("llama").to(dtype)).members[0]
        experts = pack_of(tiny_model("mixtral").to(dtype)).members[0]
        assert not caplog.records
        kept = pack_of(tiny_model("recurrent_gemma").to(dtype)).members[0]
    assert "read" in caplog.text
    assert "RecurrentGemma" in caplog.text
    for member in (dense, experts):
        assert member.engine.packs
        assert member.engine.rewinds
    with pytest.raises(LoadError, match="attends to later tokens"):
        pack_of(BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4)).to(dtype))
    assert kept.name == "a"


@pytest.mark.parametrize("family", ["llama", "mamba", "llava", "qwen3_next"])
def test_no_argument_that_this_version_has_renamed_is_used(family):
    """A warning of a library would come in the middle of an answer."""
    pack = pack_of(tiny_model(family), tiny_model(family, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = pack.generate_batch(TEXTS, draft_tokens=3)
    assert all(answer.text for answer in answers)


def test_a_vision_language_model_is_loaded_without_what_reads_images(tmp_path):
    model = tiny_model("llava")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    pack = Pack.load([tmp_path], max_tokens=16)
    loaded = pack.members[0].model
    assert sum(weight.numel() for weight in loaded.parameters()) < sum(weight.numel() for weight in model.parameters())
    assert not [name for name, _ in loaded.named_parameters() if "vision" in name]
    kept = pack_of(model)
    assert [pack.generate(text).text for text in TEXTS] == [anew(kept, text) for text in TEXTS]


def test_llamas_keep_every_shortcut():
    member = pack_of(LlamaForCausalLM(sized(LlamaConfig, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)))
    engine = member.members[0].engine
    assert engine.packs
    assert engine.rewinds
    assert engine.architecture.whole


def test_what_a_library_warns_of_is_not_seen_on_the_command_line(monkeypatch):
    from typer.testing import CliRunner

    from packllm import cli

    pack = pack_of(tiny_model("llama"))
    answer = pack.generate(TEXTS[0]).text
    assert answer
    pack.members[0].model.register_forward_pre_hook(lambda *args: warnings.warn("renamed", FutureWarning, stacklevel=2))
    monkeypatch.setattr(cli, "load_pack", lambda *args, **options: pack)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = CliRunner().invoke(cli.app, ["ask", TEXTS[0], "--raw", "--quiet"], catch_exceptions=False)
    assert found.stdout == answer + "\n"
    assert not seen


def test_sizes_that_differ_between_layers_are_no_reason_to_refuse():
    """Gemma 4's config refuses to tell one head size; what a token keeps is then estimated."""
    pack = pack_of(tiny_model("gemma4_text"))
    assert pack.members[0].engine.token_bytes > 0
    assert [pack.generate(text).text for text in TEXTS] == [anew(pack, text) for text in TEXTS]
