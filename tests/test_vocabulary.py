"""What each token id means as bytes, for the ways in which tokenizers spell bytes."""

from __future__ import annotations

import copy
import gzip
import json
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import CORPUS, SHARED, byte_level_tokenizer, sentencepiece_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from packllm import starter
from packllm.align import Vocabulary
from packllm.cache import cache_folder
from packllm.errors import PackError, VocabularyError

REAL = ("gpt2", "gpt-neox-20b", "llama3", "qwen3", "mistral-v0.1")
MODELS = ("SmolLM2-135M", "stories260K", "gemma-3-270m")

FRAGMENTS = st.one_of(
    st.sampled_from(["the ", "def ", "\n\n", "  ", "\t", " \u00a0\u3000", "\r\n", "\u0000\u001b", "\u2028", "\ufeff"]),
    st.sampled_from(["日本語", "한국어", "ไม่", "हिन्दी", "e\u0301", "ﬁ", "İ", "👨\u200d👩\u200d👧", "🇫🇷", "👍🏽"]),
    st.sampled_from(["\u0301", "a\u0327\u0301\u0323", "\u200b", "\x7f\x9f", "\t \t  \n \n", " " * 40, "\r"]),
    st.sampled_from(["▁", "▁▁x", "<0x41>", "Ġ", "##a", "</w>"]),
)
# Characters assigned when this Python was made: normalisers of different age agree on them.
UNICODE = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=20)
TEXTS = st.lists(FRAGMENTS | UNICODE, max_size=6).map("".join)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

some = settings(many, max_examples=60)

_read: dict[str, tuple[Tokenizer, Vocabulary]] = {}


def real(name: str) -> tuple[Tokenizer, Vocabulary]:
    """One of the tokenizers of ../shared, read once."""
    if name not in _read:
        path = SHARED / "tokenizers" / f"{name}.json.gz"
        if not path.exists():
            pytest.skip(f"{path} is absent")
        tokenizer = Tokenizer.from_str(gzip.decompress(path.read_bytes()).decode())
        _read[name] = tokenizer, Vocabulary.from_tokenizer(tokenizer)
    return _read[name]


def model_folder(name: str) -> Path:
    """Folder with the tokenizer of one of the real models."""
    if name == "stories260K":
        folder = SHARED / "models" / name
    elif name.startswith("SmolLM2"):
        folder = Path(starter.base_model())
    else:
        folder = next((cache_folder() / "gguf").glob(f"{name}*"), Path("absent"))
    if not folder.exists():
        pytest.skip(f"the model {name} is absent")
    return folder


def real_model(name: str) -> tuple[Tokenizer, Vocabulary]:
    """The tokenizer of a real model, read once."""
    if name not in _read:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(name))
        _read[name] = tokenizer.backend_tokenizer, Vocabulary.from_tokenizer(tokenizer)
    return _read[name]


def joined(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    return b"".join(vocabulary.tokens[i] for i in ids)


def spelled(name: str, text: str) -> bytes:
    """The bytes of it that the tokenizer has tokens for: SmolLM2's drops some rare ones without a word."""
    lost = b"\x04\x06\x13\x14\x16\x1d\xf1\xf2" if name == "SmolLM2-135M" else b""
    return normalised(name, text).encode().translate(None, lost)


def normalised(name: str, text: str) -> str:
    """What the tokenizer states that it makes of a text before it splits it."""
    if name in ("gpt-neox-20b", "qwen3"):
        return unicodedata.normalize("NFC", text)
    if name in ("mistral-v0.1", "stories260K", "word"):
        return " " + text.replace("▁", " ") if text else ""
    if name == "gemma-3-270m":
        return text.replace("▁", " ")
    return text


@many
@given(text=TEXTS)
def test_bytes_of_the_tokens_are_the_text_fixtures(text, byte_tokenizer, word_tokenizer):
    for name, tokenizer in (("byte", byte_tokenizer), ("word", word_tokenizer)):
        vocabulary = Vocabulary.from_tokenizer(tokenizer)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert joined(vocabulary, ids) == normalised(name, text).encode()


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
@many
@given(text=TEXTS)
def test_bytes_of_the_tokens_are_the_text(shared, name, text):
    tokenizer, vocabulary = real(name)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert joined(vocabulary, ids) == normalised(name, text).encode()


@pytest.mark.real
@pytest.mark.parametrize("name", MODELS)
@some
@given(text=TEXTS)
def test_bytes_of_the_tokens_are_the_text_real_models(shared, name, text):
    tokenizer, vocabulary = real_model(name)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert joined(vocabulary, ids) == spelled(name, text)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("SmolLM2-135M", {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"}),
        ("stories260K", {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}),
        ("gemma-3-270m", {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}),
    ],
)
def test_roles_of_real_models(shared, name, roles):
    _, vocabulary = real_model(name)
    assert {role: vocabulary.tokens[i].decode() for role, i in vocabulary.special.items()} == roles
    assert vocabulary.control >= set(vocabulary.special.values())


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_every_used_id_of_a_real_tokenizer_has_bytes(shared, name):
    tokenizer, vocabulary = real(name)
    used = set(tokenizer.get_vocab(with_added_tokens=True).values())
    assert len(vocabulary) == max(used) + 1
    assert vocabulary.unused == set(range(len(vocabulary))) - used
    assert all(vocabulary.tokens[i] for i in used)
    specials = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert vocabulary.control == specials
    assert all(vocabulary.tokens[i].decode() == tokenizer.id_to_token(i) for i in specials)


def test_byte_level(byte_tokenizer):
    vocabulary = Vocabulary.from_tokenizer(byte_tokenizer)
    ids = byte_tokenizer.get_vocab()
    assert vocabulary.tokens[ids["Ġ"]] == b" "
    assert vocabulary.tokens[ids["Ċ"]] == b"\n"
    assert vocabulary.tokens[ids["Ġthe"]] == b" the"
    assert vocabulary.tokens[ids["ð"]] == b"\xf0"
    assert {t for t in vocabulary.tokens if len(t) == 1} >= {bytes([b]) for b in range(256)}
    assert [vocabulary.tokens[i] for i in range(3)] == [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>"]
    assert vocabulary.special == {"eos": 2, "pad": 0, "unk": 0}
    assert vocabulary.control == {0, 1, 2}
    assert vocabulary.unused == frozenset()
    assert [vocabulary.text_bytes(i) for i in (0, 1, 2, ids["Ċ"])] == [b"", b"", b"", b"\n"]


def test_word_marker_with_byte_fallback(word_tokenizer):
    vocabulary = Vocabulary.from_tokenizer(word_tokenizer)
    ids = word_tokenizer.get_vocab()
    assert vocabulary.tokens[ids["▁"]] == b" "
    assert vocabulary.tokens[ids["▁the"]] == b" the"
    assert vocabulary.tokens[ids["<0x0A>"]] == b"\n"
    assert vocabulary.tokens[ids["<0xF0>"]] == b"\xf0"
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0}
    assert vocabulary.control == {0, 1, 2}


def test_end_of_word_suffix():
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, end_of_word_suffix="</w>"))
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.tokens[tokenizer.token_to_id("the</w>")] == b"the "
    # Words are split at white space, which is lost: each ends in one space.
    assert joined(vocabulary, tokenizer.encode("the  quick\nfox").ids) == b"the quick fox "


def test_end_of_word_suffix_on_byte_level():
    pieces = ["a", "Ã", "©", "a</w>", "©</w>"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    assert Vocabulary.from_tokenizer(tokenizer).tokens == [b"a", b"\xc3", b"\xa9", b"a ", b"\xa9 "]


def unigram(replacement: str = "▁") -> Tokenizer:
    """A Unigram model with byte fallback, made by hand."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [replacement, f"{replacement}the", "th", "e", "é", f"{replacement}日", "日本", "</s>"]
    vocab = [*((piece, -20.0) for piece in pieces), *((word, -2.0 - i / 10) for i, word in enumerate(words))]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement)])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


@many
@given(text=TEXTS.filter(lambda text: "<0x" not in text))  # Unigram may take a spelled byte piece for the byte
def test_unigram(text):
    tokenizer = unigram()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    shown = text.replace("▁", " ")
    shown = shown if not text or shown.startswith(" ") else " " + shown
    assert joined(vocabulary, tokenizer.encode(text).ids) == shown.encode()


def test_unigram_by_hand():
    vocabulary = Vocabulary.from_tokenizer(unigram())
    assert vocabulary.tokens[257:] == [
        b" ",
        b" the",
        b"th",
        b"e",
        "é".encode(),
        " 日".encode(),
        "日本".encode(),
        b"</s>",
    ]
    assert vocabulary.control == {0, 264}
    assert vocabulary.tokens[1 + 0x41] == b"A"


def test_another_word_marker():
    assert Vocabulary.from_tokenizer(unigram("_")).same_as(Vocabulary.from_tokenizer(unigram()))


def test_wordpiece():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert joined(vocabulary, tokenizer.encode("playing play").ids) == b" playing play"


def test_added_tokens_are_text_unless_special():
    tokenizer = byte_level_tokenizer()
    first = len(tokenizer)
    tokenizer.add_tokens(
        [AddedToken("<tool>"), AddedToken("数 é"), AddedToken("<|end|>", special=True)], special_tokens=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.tokens[first:] == [b"<tool>", "数 é".encode(), b"<|end|>"]
    assert [vocabulary.text_bytes(first + i) for i in range(3)] == [b"<tool>", "数 é".encode(), b""]
    assert first + 2 in vocabulary.control
    assert not {first, first + 1} & vocabulary.control


def test_a_piece_that_is_an_added_token_too_keeps_its_bytes():
    # Gemma lists its runs of spaces so, spelled with the word marker.
    tokenizer = sentencepiece_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    piece = data["model"]["vocab"]["▁▁"] = len(tokenizer)
    data["model"]["merges"].append(["▁", "▁"])
    token = {**data["added_tokens"][0], "id": piece, "content": "▁▁", "special": False, "normalized": False}
    data["added_tokens"].append(token)
    vocabulary = Vocabulary.from_json(data)
    assert vocabulary.tokens[piece] == b"  "
    ids = Tokenizer.from_str(json.dumps(data)).encode("a  b", add_special_tokens=False).ids
    assert joined(vocabulary, ids) == b" a  b"


def test_byte_pieces_of_bytes_that_other_pieces_spell_are_shadowed(word_tokenizer, byte_tokenizer):
    vocabulary, ids = Vocabulary.from_tokenizer(word_tokenizer), word_tokenizer.get_vocab()
    assert {ids["<0x41>"], ids["<0x20>"]} <= vocabulary.shadowed
    assert ids["<0xF0>"] not in vocabulary.shadowed
    texts = [word_tokenizer(text, add_special_tokens=False).input_ids for text in CORPUS]
    assert not vocabulary.shadowed & {i for ids in texts for i in ids}
    assert all(vocabulary.tokens.count(vocabulary.tokens[i]) > 1 for i in vocabulary.shadowed)
    assert not Vocabulary.from_tokenizer(byte_tokenizer).shadowed


def test_the_first_ids_alone(byte_tokenizer):
    whole = Vocabulary.from_tokenizer(byte_tokenizer)
    cut = whole.first(2)
    assert (cut.tokens, cut.special, cut.control) == (whole.tokens[:2], {"pad": 0, "unk": 0}, {0, 1})
    assert not cut.same_as(whole)
    assert whole.first(len(whole)) is whole


def test_one_more_role(make_member):
    plain = make_member("llama").encoder  # its template ends each turn with the tokenizer's end
    assert plain.vocabulary.special == {"eos": 2, "pad": 0, "unk": 0, "end_of_turn": 2}
    more = Vocabulary([b"a", b"<end>"], {"eos": 0}, frozenset({0}), frozenset()).with_role("end_of_turn", 1)
    assert (more.special, more.control) == ({"eos": 0, "end_of_turn": 1}, {0, 1})


def test_roles_make_control_tokens(byte_tokenizer):
    data = json.loads(byte_tokenizer.backend_tokenizer.to_str())

    class Roles:
        bos_token_id, eos_token_id, pad_token_id, unk_token_id = 5, 2, None, None

    vocabulary = Vocabulary.from_json(data, Roles())
    assert vocabulary.special == {"bos": 5, "eos": 2}
    assert 5 in vocabulary.control
    assert vocabulary.text_bytes(5) == b""


def holed(byte_tokenizer) -> dict:
    """A tokenizer whose ids have a gap before one added token."""
    data = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    data["added_tokens"].append({**data["added_tokens"][0], "id": len(byte_tokenizer) + 3, "content": "<|late|>"})
    return data


def test_unused_ids(byte_tokenizer):
    size = len(byte_tokenizer)
    vocabulary = Vocabulary.from_json(holed(byte_tokenizer))
    assert len(vocabulary) == size + 4
    assert vocabulary.unused == {size, size + 1, size + 2}
    assert vocabulary.tokens[size:] == [b"", b"", b"", b"<|late|>"]


def test_no_tokens_at_all():
    vocabulary = Vocabulary.from_tokenizer(Tokenizer(models.BPE()))
    assert (len(vocabulary), vocabulary.unused, vocabulary.control) == (0, frozenset(), frozenset())


def test_same_as_goes_by_content(byte_tokenizer, word_tokenizer):
    one = Vocabulary.from_tokenizer(byte_tokenizer)

    class Renamed(PreTrainedTokenizerFast):
        pass

    same = Renamed(tokenizer_object=Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str()), name_or_path="other")
    assert one.same_as(Vocabulary.from_tokenizer(same))
    assert one.same_as(one)
    assert one.fingerprint == Vocabulary.from_tokenizer(same).fingerprint
    assert not one.same_as(Vocabulary.from_tokenizer(word_tokenizer))
    assert not one.same_as(Vocabulary.from_tokenizer(byte_level_tokenizer(399)))  # same name and class, one token less


def test_same_as_across_spellings():
    # Three tokens spelled in two alphabets: the bytes are the same.
    byte_level = Tokenizer(models.BPE({"a": 0, "Ġa": 1, "Ã": 2}, []))
    byte_level.decoder = decoders.ByteLevel()
    marked = Tokenizer(models.BPE({"a": 0, "▁a": 1, "<0xC3>": 2}, [], byte_fallback=True))
    marked.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    one, two = Vocabulary.from_tokenizer(byte_level), Vocabulary.from_tokenizer(marked)
    assert one.tokens == [b"a", b" a", b"\xc3"]
    assert one.same_as(two)


def test_one_swapped_pair_of_ids_is_another_vocabulary(byte_tokenizer):
    data = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    swapped = copy.deepcopy(data)
    pieces = swapped["model"]["vocab"]
    pieces["a"], pieces["b"] = pieces["b"], pieces["a"]
    assert not Vocabulary.from_json(data).same_as(Vocabulary.from_json(swapped))


def test_fingerprint_keeps_token_borders_apart():
    def of(*tokens: bytes) -> str:
        return Vocabulary(list(tokens), {}, frozenset(), frozenset()).fingerprint

    assert of(b"ab", b"c") != of(b"a", b"bc")
    assert of(b"a", b"") != of(b"a")
    assert of(b"a", b"b") == of(b"a", b"b")


def test_padding_rows_of_the_model_do_not_count(make_member):
    # The fixtures' models have 24 rows more than their tokenizers.
    member = make_member("llama")
    assert member.model.config.vocab_size == len(member.vocabulary) + 24
    assert member.vocabulary_size == len(member.vocabulary)
    assert member.real(torch.zeros(1, member.model.config.vocab_size)).shape == (1, len(member.vocabulary))
    other = byte_level_tokenizer()
    assert member.vocabulary.same_as(Vocabulary.from_tokenizer(other))


def test_a_tokenizer_without_backend_is_refused():
    class SlowTokenizer:
        eos_token_id = 1

    with pytest.raises(VocabularyError, match="SlowTokenizer has no `tokenizers` backend; load the fast version"):
        Vocabulary.from_tokenizer(SlowTokenizer())
    assert issubclass(VocabularyError, PackError)


def odd(byte_tokenizer, change) -> dict:
    data = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    change(data)
    return data


ODD = {
    "an id far out": lambda d: d["model"]["vocab"].update(a=5 * 10**7),
    "an added id far out": lambda d: d["added_tokens"][0].update(id=5 * 10**7),
    "a negative id": lambda d: d["model"]["vocab"].update(a=-1),
    "a truth for an id": lambda d: d["model"]["vocab"].update(a=True),
    "no id": lambda d: d["model"]["vocab"].update(a=None),
    "no model": lambda d: d.update(model=None),
    "a list for a model": lambda d: d.update(model=[1]),
    "no vocabulary": lambda d: d["model"].pop("vocab"),
    "numbers for pieces": lambda d: d["model"].update(vocab=[1, 2]),
    "nulls for pieces": lambda d: d["model"].update(vocab=[[None, 1.0]]),
    "a mapping of added tokens": lambda d: d.update(added_tokens={"a": 1}),
    "an added token without text": lambda d: d["added_tokens"][0].pop("content"),
    "numbers for added tokens": lambda d: d.update(added_tokens=[3]),
    "half a character": lambda d: d["model"]["vocab"].update({"\ud800": 3}),
    "a number for a suffix": lambda d: d["model"].update(end_of_word_suffix=7),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_tokenizer_is_refused(byte_tokenizer, kind):
    with pytest.raises(VocabularyError):
        Vocabulary.from_json(odd(byte_tokenizer, ODD[kind]))


@pytest.mark.parametrize("content", [None, [], [1], "text", 5, {}, {"model": "BPE"}, {"model": {"vocab": None}}])
def test_what_is_no_tokenizer_at_all_is_refused(content):
    with pytest.raises(VocabularyError, match=r"no tokenizer\.json"):
        Vocabulary.from_json(content)
