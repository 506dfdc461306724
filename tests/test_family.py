"""A base and its fine-tunes are one vocabulary: text tokens decide, each member ends answers in its own way."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CORPUS, _config
from conftest import TextPack as Pack
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from packllm import Member, VocabularyError
from packllm.align.shared import Shared

PROMPTS = ("The court shall order relief", "Diabetes is a disease in which", "def add(a, b):")


def trained(size: int = 300) -> dict:
    """A byte-level BPE without control tokens, as the content of a tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return json.loads(tokenizer.to_str())


BASE = trained()


def tokenizer(end: str, first: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The base's text tokens, after and before control tokens."""
    data = json.loads(json.dumps(BASE))
    pieces = {piece: i + len(first) for piece, i in data["model"]["vocab"].items()}
    data["model"]["vocab"] = {**{token: i for i, token in enumerate(first)}, **pieces}
    count = len(data["model"]["vocab"])
    ids = {**{token: i for i, token in enumerate(first)}, **{token: count + i for i, token in enumerate(last)}}
    data["added_tokens"] = [
        {
            "id": i, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False,
        }
        for token, i in ids.items()
    ]  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token=end)


KINDS = {
    "base": lambda: tokenizer("</s>", last=("</s>",)),
    "pad": lambda: tokenizer("</s>", last=("</s>", "<pad>")),
    "chat": lambda: tokenizer("<|im_end|>", last=("</s>", "<|im_start|>", "<|im_end|>")),
    "renamed": lambda: tokenizer("<eot>", last=("<eot>",)),
    "shifted": lambda: tokenizer("[END]", first=("[A]", "[B]", "[END]")),
}


def member(kind: str, seed: int) -> Member:
    spoken = KINDS[kind]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config("llama", len(spoken) + 8), attn_implementation="eager").eval()
    return Member(model, spoken, kind)


def by_bytes(one: Member, ids: list[int]) -> dict[bytes, float]:
    """What a member gives each next text token, by its bytes, and the end, as b""."""
    with torch.inference_mode():
        logits = one.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    chances = one.real(logits).softmax(-1).tolist()
    control = one.vocabulary.control | one.vocabulary.added
    said = {one.vocabulary.tokens[i]: p for i, p in enumerate(chances) if i not in control}
    return {**said, b"": sum(chances[i] for i in one.end_ids)}


def naive(members: list[Member], weights: list[float], pool: str, prompt: str, count: int) -> str:
    """Greedy fusion that knows bytes only: no ids are shared."""
    written: list[bytes] = []
    for _ in range(count):
        parts = []
        for one in members:
            id_of = {token: i for i, token in enumerate(one.vocabulary.tokens) if one.vocabulary.is_text(i)}
            parts.append(by_bytes(one, one.encoder.plain(prompt) + [id_of[token] for token in written]))
        if pool == "linear":
            fused = {t: sum(w * p[t] for w, p in zip(weights, parts, strict=True)) for t in parts[0]}
        else:
            logs = [{t: torch.tensor(p).log().item() for t, p in part.items()} for part in parts]
            fused = {t: sum(w * log[t] for w, log in zip(weights, logs, strict=True)) for t in parts[0]}
        token = max(fused, key=fused.__getitem__)
        if token == b"":
            break
        written.append(token)
    return b"".join(written).decode(errors="replace")


@pytest.mark.parametrize("pool", ["linear", "log"])
@pytest.mark.parametrize("kinds", [("base", "pad"), ("base", "chat"), ("renamed", "chat"), ("shifted", "base", "pad")])
def test_a_family_fuses_token_by_token_as_a_loop_over_bytes_does(kinds, pool):
    members = [member(kind, seed) for seed, kind in enumerate(kinds)]
    weights = dict(zip(kinds, (0.5, 0.3, 0.2), strict=False))
    total = sum(weights.values())
    weights = {kind: weight / total for kind, weight in weights.items()}
    for draft in (1, 4):
        pack = Pack(members, weighting=weights, pool=pool, decoding="tokens", max_tokens=16, draft_tokens=draft)
        for prompt in PROMPTS:
            assert pack.generate(prompt).text == naive(members, list(weights.values()), pool, prompt, 16)
        assert [answer.text for answer in pack.generate_batch(PROMPTS)] == [pack.generate(p).text for p in PROMPTS]


@pytest.mark.parametrize("weighting", ["em", "opt", "exact"])
def test_weights_do_not_see_where_ids_lie(weighting):
    plain = Pack([member("base", 0), member("base", 1)], weighting=weighting)
    moved = member("shifted", 0)
    body, head = moved.model.get_input_embeddings().weight, moved.model.get_output_embeddings().weight
    with torch.no_grad():  # the base's weights, in the other's ids
        moved.model.load_state_dict(
            plain.members[0].model.state_dict() | {"model.embed_tokens.weight": body, "lm_head.weight": head},
            strict=False,
        )
        count = len(BASE["model"]["vocab"])
        body[3 : 3 + count] = plain.members[0].model.get_input_embeddings().weight[:count]
        head[3 : 3 + count] = plain.members[0].model.get_output_embeddings().weight[:count]
        head[2] = plain.members[0].model.get_output_embeddings().weight[count]
        head[:2] = head[3 + count :] = 0.0
    family = Pack([moved, plain.members[1]], weighting=weighting)
    text = CORPUS[0]
    found, expected = family.weigh(text), plain.weigh(text)
    assert found.unit == expected.unit == "token"
    assert found.scored == expected.scored
    assert found.values == pytest.approx(expected.values, abs=0.05)  # other control tokens, so other normalisers


def test_members_end_as_often_together_as_alone():
    """Two members that end with .5 in ids of their own: so does the pack, in either pool."""
    members = [member("base", 0), member("chat", 1)]
    for one in members:
        with torch.no_grad():
            one.model.get_output_embeddings().weight.zero_()
            bias = torch.zeros(one.model.config.vocab_size)
            for end in one.end_ids:
                bias[end] = torch.tensor(float(one.vocabulary_size)).log()
            one.model.get_output_embeddings().register_forward_hook(lambda _, args, out, bias=bias: out + bias)
    alone = [by_bytes(one, one.encoder.plain(PROMPTS[0]))[b""] for one in members]
    shared = Shared.of(
        [m.vocabulary for m in members], [m.end_ids for m in members], [m.vocabulary_size for m in members]
    )
    assert shared is not None
    for pool in ("linear", "log"):
        pack = Pack(members, weighting={"base": 0.5, "chat": 0.5}, pool=pool, temperature=1.0, max_tokens=1)
        ended = sum(pack.generate(PROMPTS[0], seed=seed).finish_reason == "stop" for seed in range(200))
        assert abs(ended / 200 - sum(alone) / 2) < 0.12  # 3.4 standard deviations


def test_other_text_tokens_are_another_vocabulary(caplog):
    other = json.loads(json.dumps(BASE))
    kept = list(other["model"]["vocab"])[:-20]
    other["model"]["vocab"] = {piece: i for i, piece in enumerate(kept)}
    other["model"]["merges"] = [m for m in other["model"]["merges"] if "".join(m) in other["model"]["vocab"]]
    spoken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(other)))
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(_config("llama", len(spoken))).eval()
    pack = Pack([member("base", 0), Member(model, spoken, "less")], max_tokens=4)
    share = round(100 * len(kept) / len(BASE["model"]["vocab"]))
    with pytest.raises(
        VocabularyError, match=f"{share}% of their tokens are in both.*decoding='cool', 'mined' or 'auto'"
    ):
        pack.generate("a", decoding="tokens")
    with caplog.at_level("INFO", "packllm"):
        assert pack.generate(PROMPTS[0]).usage.completion_tokens > 0  # auto goes by segments
    assert f"({share}% of their tokens are in both): decoding segment by segment (decoding='cool')" in caplog.text
