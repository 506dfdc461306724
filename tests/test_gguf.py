"""GGUF files: converted once, tensor by tensor, from the file alone; caches that fail or are damaged."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
import weakref
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from packllm import LoadError, Member, Pack, VocabularyError, estimate
from packllm.cache import cache_folder
from packllm.engines.base import Read
from packllm.engines.llama_cpp.native import VERSION, installed
from packllm.engines.load import Loader
from packllm.engines.transformers import gguf as conversion
from packllm.engines.transformers.gguf import converted

NORM = b"output_norm.weight"
IDS = torch.tensor([[5, 60, 200, 7, 33, 34, 35]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(conversion, "_without_cache", {})
    return tmp_path / "cache"


def refused(path: Path) -> str:
    with pytest.raises(LoadError) as caught:
        Loader(engine="transformers").members([path])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_gguf(member: Member, path: Path, filler: str = "[PAD{}]", **words) -> None:
    """A tiny Llama in llama.cpp's format, float32.

    Args:
        filler: the name of rows that the tokenizer lacks, of a row's id.
        words: of GGUFWriter.
    """
    config, weights = member.model.config, member.model.state_dict()
    tokenizer = json.loads(member.tokenizer.backend_tokenizer.to_str())
    pieces = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    special = {t["content"] for t in tokenizer["added_tokens"]}
    tokens = [filler.format(i) for i in range(config.vocab_size)]
    for piece, i in pieces.items():
        tokens[i] = piece
    kinds = {piece: gguf.TokenType.CONTROL if piece in special else gguf.TokenType.NORMAL for piece in pieces}
    writer = gguf.GGUFWriter(path, "llama", **words)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.UNUSED) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    if member.encoder.template is not None:
        writer.add_chat_template(member.encoder.template)
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp turns the halves of a head into pairs
            weight = weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(make_member, tmp_path, cache):
    member = make_member("llama", 3)
    path = tmp_path / "tiny.v1.gguf"
    write_gguf(member, path)
    loaded = Loader(engine="transformers").members([path, f"again={path}"])[0]
    assert loaded.name == "tiny.v1"
    assert (logits(loaded.model) - logits(member.model)).abs().max() < 1e-4
    text = "The quick brown fox\n\n日本 😀"
    assert loaded.encoder.plain(text) == member.encoder.plain(text)
    (folder,) = (cache / "gguf").iterdir()  # one folder, no drafts
    assert (folder / "model.safetensors").exists()
    assert converted(path) == folder


def with_a_hole(member: Member) -> Member:
    """The same without the piece before the last, whose id nothing has then."""
    data = json.loads(member.tokenizer.backend_tokenizer.to_str())
    _, hole = sorted((i, piece) for piece, i in data["model"]["vocab"].items())[-2]
    del data["model"]["vocab"][hole]
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if "".join(pair) != hole]
    tokenizer = copy.deepcopy(member.tokenizer)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    return Member(member.model, tokenizer, "holed")


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
@pytest.mark.parametrize("filler", ["[PAD{}]", "<dummy{:05}>", "[PAD1{}]"])
@pytest.mark.parametrize("holed", [False, True])
def test_rows_without_a_token_do_not_part_a_family(make_member, tmp_path, engine, filler, holed):
    """As converters name them, behind the tokens and between them: a file and its twin have one vocabulary, and the
    same greedy text beside a third."""
    if engine == "llama.cpp" and installed() != VERSION:
        pytest.skip(f"needs llama-cpp-python=={VERSION} (extra llama-cpp)")
    member, other = make_member("llama", 3), make_member("llama", 0)
    twin = with_a_hole(member) if holed else member
    write_gguf(twin, tmp_path / "tiny.gguf", filler)
    (ours,) = Loader(engine=engine).members([tmp_path / "tiny.gguf"])
    if engine == "llama.cpp":
        ours.engine._context(None).kind = 0  # keys and values in 32 bits
    assert ours.vocabulary.akin(twin.vocabulary)
    assert ours.vocabulary.unused == twin.vocabulary.unused
    assert len(ours.vocabulary.unused) == holed
    assert ours.vocabulary_size == twin.vocabulary_size == len(twin.vocabulary) < twin.model.config.vocab_size
    answers = []
    for first in (twin, ours):
        pack = Pack([first, other] if not holed else [first, twin], weighting="uniform", decoding="tokens")
        found = pack.generate("Once upon a time", chat_template=False, max_tokens=16)
        assert found.weights.unit == "token"
        answers.append(found.text)
    assert answers[0] == answers[1] != ""


def test_a_model_in_parts(make_member, tmp_path):
    """All of them are read, whichever is named; its own head is in a later one."""
    own = make_member("llama", 3)
    write_gguf(own, tmp_path / "tiny.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for named in (parts[0], parts[-1]):
        (member,) = Loader(engine="transformers").members([named])
        assert (logits(member.model) - logits(own.model)).abs().max() < 1e-4
        size = sum(weight.nbytes for weight in own.model.state_dict().values())
        assert estimate([named], engine="transformers").weights == pytest.approx(size, rel=0.02)
    parts[1].unlink()
    assert f"it is in 3 parts, and {parts[1].name} is not beside it" in refused(parts[0])


@pytest.mark.parametrize("content", [b"no model at all", b"GGUF", b"GGUF\x03\x00\x00\x00", b""])
def test_not_a_gguf_file(tmp_path, cache, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert refused(path).startswith(f"cannot read {str(path)!r}: it is ")
    assert list((cache / "gguf").iterdir()) == []


@pytest.fixture(scope="module")
def tiny(make_member, tmp_path_factory) -> Path:
    """A whole GGUF file of a tiny Llama."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(make_member("llama", 3), path)
    return path


def test_a_cut_file_is_refused_wherever_it_ends(tiny, tmp_path):
    content = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    for end in [5, 23, 24, 60, 500, 5000, *range(20000, len(content), len(content) // 5), len(content) - 40]:
        path.write_bytes(content[:end])
        assert "cut off" in refused(path), end


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"llama.block_count" + struct.pack("<II", 4, 2), b"llama.block_count" + struct.pack("<II", 4, 10**9), "10000"),
        (b"llama.vocab_size" + struct.pack("<I", 4), b"llama.vocab_size" + struct.pack("<I", 5), ""),
        (
            b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama",
            b"general.architecture" + struct.pack("<IQ", 8, 5) + b"bark2",
            "bark2",
        ),
        (
            b"output_norm.weight" + struct.pack("<IQI", 1, 32, 0),
            b"output_norm.weight" + struct.pack("<IQI", 1, 32, 99),
            "99",
        ),
        (
            b"output_norm.weight" + struct.pack("<IQ", 1, 32),
            b"output_norm.weight" + struct.pack("<IQ", 1, 2**60),
            "cut",
        ),
        (b"blk.0.attn_norm.weight", b"blk.7.attn_norm.weight", ""),
    ],
    ids=["layers", "vocabulary", "architecture", "type", "size", "name"],
)
def test_a_header_that_lies_is_refused(tiny, tmp_path, old, new, said):
    content = tiny.read_bytes()
    assert content.count(old) == 1
    path = tmp_path / "lie.gguf"
    path.write_bytes(content.replace(old, new))
    if new.startswith(b"llama.vocab_size"):  # another type of the same number is no lie
        assert Loader(engine="transformers").members([path])[0].model.config.vocab_size
        return
    assert said in refused(path)


def fields(content: bytes) -> list[tuple[str, int, int]]:
    """(what it is, where, bytes) of every number in a header that says how the rest is to be read."""
    found, at = [], 4

    def take(what: str, size: int) -> int:
        nonlocal at
        found.append((what, at, size))
        at += size
        return int.from_bytes(content[at - size : at], "little")

    def text() -> None:
        nonlocal at
        size = take("length", 8)
        at += size

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = take("type", 4), take("count", 8)
            for _ in range(count):
                value(inner)
        else:
            at += {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4)

    take("version", 4)
    tensors, entries = take("count", 8), take("count", 8)
    for _ in range(entries):
        text()
        value(take("type", 4))
    for _ in range(tensors):
        text()
        for _ in range(take("dimensions", 4)):
            take("size", 8)
        take("type", 4)
        take("offset", 8)
    return found


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp"])
def test_spoilt_headers_are_refused_or_read(tiny, tmp_path, engine):
    """Any count, length, type, size or offset of a header changed, or the file cut after it: an error of ours, or a
    model that runs."""
    if engine == "llama.cpp" and installed() != VERSION:
        pytest.skip(f"needs llama-cpp-python=={VERSION} (extra llama-cpp)")
    content, outcomes = tiny.read_bytes(), []
    by_kind: dict[str, list[tuple[int, int]]] = {}
    for what, at, size in fields(content):
        by_kind.setdefault(what, []).append((at, size))
    assert set(by_kind) == {"version", "count", "length", "type", "dimensions", "size", "offset"}
    places = st.sampled_from(sorted(by_kind)).flatmap(lambda what: st.sampled_from(by_kind[what][-40:]))
    changes = st.sampled_from([lambda n: 0, lambda n: n + 1, lambda n: n - 1, lambda n: 2 * n, lambda n: 2**31 - n,
                               lambda n: 2**62 + n, lambda n: -1, lambda n: n ^ 8, lambda n: n])  # fmt: skip
    path = tmp_path / "x.gguf"

    @settings(max_examples=50, derandomize=True, deadline=None)
    @given(places, changes, st.booleans())
    def run(place: tuple[int, int], change: Callable[[int], int], cut: bool) -> None:
        at, size = place
        number = change(int.from_bytes(content[at : at + size], "little")) % 256**size
        spoilt = content[:at] + number.to_bytes(size, "little") + content[at + size :]
        path.write_bytes(spoilt[: at + size + 8] if cut else spoilt)
        try:
            (member,) = Loader(engine=engine).members([path])
        except (LoadError, VocabularyError) as error:
            outcomes.append(type(error))
        else:
            (answer,) = member.engine.read([Read(member.open(), [1, 2, 3], "last")])
            outcomes.append(type(answer) if isinstance(answer, Exception) else tuple(answer.shape))

    run()
    assert outcomes.count(LoadError) > 20
    assert (1, 400) in outcomes


def test_nothing_beside_the_file_is_read(tiny, tmp_path, monkeypatch):
    for name in ("model.py", "evil.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "evil.Evil")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "generation_config.json").write_text("[")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    path = Path(shutil.copy(tiny, tmp_path / "x.gguf"))
    for trust in (False, True):
        (member,) = Loader(trust_remote_code=trust).members([path])
        assert member.vocabulary_size > 300
    assert not (tmp_path / "ran").exists()


def test_it_is_written_tensor_by_tensor(tiny, tmp_path, monkeypatch):
    each, alive, most = conversion._tensors, [], 0

    def watched(path, table):
        nonlocal most
        for name, tensor in each(path, table):
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor
            most = max(most, sum(ref() is not None for ref in alive))

    monkeypatch.setattr(conversion, "_tensors", watched)
    folder = converted(tiny)
    assert len(alive) == len(load_file(folder / "model.safetensors")) == 21
    assert most <= 1


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """Stands in for the conversion, which takes long: writes one file, and notes where."""
    drafts: list[Path] = []

    def convert(path: Path, folder: Path) -> None:
        assert folder.is_dir()
        drafts.append(folder)
        (folder / "content").write_bytes(path.read_bytes())

    monkeypatch.setattr(conversion, "_convert", convert)
    return drafts


def test_a_file_is_converted_once(tmp_path, cache, conversions):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    folder = converted(path)
    assert folder.parent == cache / "gguf" == cache_folder() / "gguf"
    assert (folder / "content").read_bytes() == b"one"
    assert conversions[0] != folder  # made elsewhere, then renamed
    assert converted(path) == folder
    assert len(conversions) == 1
    assert list(folder.parent.iterdir()) == [folder]


def test_another_content_is_another_folder(tmp_path, conversions):
    path = tmp_path / "m.gguf"
    folders = set()
    for content in (
        b"one",
        b"two",
        bytes(3 * 2**20),
        bytes(3 * 2**20 + 1),
        b"x" + bytes(3 * 2**20 - 1),
        bytes(3 * 2**20 - 1) + b"x",
        bytes(2**20) + b"x" + bytes(2**21 - 1),  # in the midst
    ):
        path.write_bytes(content)
        folders.add(converted(path))
    assert len(folders) == len(conversions) == 7


def test_a_failed_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")

    def fail(path: Path, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise LoadError("disk full")

    monkeypatch.setattr(conversion, "_convert", fail)
    with pytest.raises(LoadError, match="disk full"):
        converted(path)
    assert list((cache / "gguf").iterdir()) == []
    monkeypatch.setattr(conversion, "_convert", lambda path, folder: (folder / "whole").write_text("whole"))
    assert sorted(os.listdir(converted(path))) == ["packllm-2.json", "whole"]


def test_another_process_that_was_faster_wins(tmp_path, cache, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    theirs = cache / "gguf" / f"m-{conversion._key(path)[:16]}"

    def convert(path: Path, folder: Path) -> None:
        (folder / "ours").write_text("")
        theirs.mkdir()
        (theirs / "theirs").write_text("")
        conversion._seal(theirs)

    monkeypatch.setattr(conversion, "_convert", convert)
    monkeypatch.setattr(os, "rename", _rename_onto_nothing)
    assert converted(path) == theirs
    assert sorted(os.listdir(theirs)) == ["packllm-2.json", "theirs"]
    assert list(theirs.parent.iterdir()) == [theirs]


def _rename_onto_nothing(source: Path, target: Path, rename=os.rename) -> None:
    """Their folder comes between our look and our move."""
    if Path(target).name == "damaged":
        raise FileNotFoundError(source)
    rename(source, target)


def test_a_file_is_hashed_once_while_it_stays_as_it_is(tmp_path, conversions, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(conversion, "_RACY", -1.0)  # the time of the last change is the clock's, and fresh
    hashed, digest = [], conversion._digest
    monkeypatch.setattr(conversion, "_digest", lambda file: hashed.append(file) or digest(file))
    first = converted(path)
    assert hashed.count(path) == 1
    assert converted(path) == first
    assert hashed.count(path) == 1
    path.write_bytes(b"two")
    os.utime(path, (1e9, 1e9))
    assert converted(path) != first
    assert hashed.count(path) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "packllm-2.json").unlink(),
        lambda folder: (folder / "packllm-2.json").write_text("[1]"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        lambda folder: flip(folder / "model.safetensors"),
        lambda folder: [file.unlink() for file in folder.iterdir()],
    ],
    ids=["no manifest", "manifest", "no weights", "config", "cut", "a bit", "empty"],
)
def test_a_damaged_conversion_is_made_again(tiny, spoil):
    before = {name: weight.clone() for name, weight in load_file(converted(tiny) / "model.safetensors").items()}
    spoil(converted(tiny))
    (member,) = Loader(engine="transformers").members([tiny])
    after = load_file(converted(tiny) / "model.safetensors")
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert len(list(converted(tiny).parent.iterdir())) == 1
    assert torch.equal(member.model.model.norm.weight, before["model.norm.weight"])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def test_without_a_cache_it_is_converted_for_this_process(tiny, tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    (member,) = Loader(engine="transformers").members([tiny])
    assert member.vocabulary_size > 300
    assert "for this process only" in caplog.text
    made = []
    monkeypatch.setattr(conversion, "_convert", lambda *_: made.append(1))
    assert (converted(tiny) / "model.safetensors").exists()
    assert not made


def test_a_full_disk_is_said(tiny, cache, monkeypatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "_write_each", full)
    with pytest.raises(
        LoadError, match=r"No space left on device; it takes \d+ MiB in .*; free some space, or set PACKLLM_CACHE"
    ):
        converted(tiny)
    assert list((cache / "gguf").iterdir()) == []
