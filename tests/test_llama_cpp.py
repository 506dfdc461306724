"""GGUF files in llama.cpp: the contract of engines, over the real SmolLM2; packs; files that are odd."""

from __future__ import annotations

import gc
import json
import random
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from engines import contract
from engines.contract import *  # noqa: F403
from engines.contract import Subject
from safetensors.torch import save_file
from test_batches import saved_experts
from test_gguf import write_gguf
from torch import Tensor

from packllm import LoadError, Member, OptionError, Pack, VocabularyError, starter
from packllm.engines import load as load_module
from packllm.engines.base import Read
from packllm.engines.llama_cpp import native
from packllm.engines.llama_cpp.context import FIRST, SLOTS, Context, State
from packllm.engines.llama_cpp.native import VERSION, installed
from packllm.engines.load import Loader
from packllm.errors import ExtraError

if installed() != VERSION:
    pytest.skip(f"needs llama-cpp-python=={VERSION} (extra llama-cpp)", allow_module_level=True)

TEXT = (
    "The court shall order relief. What is the capital of France? Once upon a time there was a planner, and it "
    "chose an index scan. The debtor objects within thirty days of it."
)


@pytest.fixture(scope="module")
def members():
    """The starter's general model and its medicine expert, in one engine."""
    if starter.base_file() is None:
        pytest.skip(starter.WEIGHTS)
    return Loader(engine="llama.cpp").members(starter.specs("llama.cpp")[:2])


@pytest.fixture(scope="module")
def tiny(make_member, tmp_path_factory) -> tuple[Member, Member]:
    """A Llama in torch, and the same in a float32 GGUF file."""
    member, path = make_member("llama", 3), tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(member, path)
    loaded = Loader(engine="llama.cpp").members([path])[0]
    loaded.engine._context(None).kind = 0  # keys and values in 32 bits: all as in torch
    return member, loaded


def torch_rows(model, ids: Sequence[int], size: int) -> Tensor:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits[:, :size].float().log_softmax(-1)


@pytest.fixture(params=["tiny", "smollm2"])
def subject(request, monkeypatch) -> Subject:
    """The tiny one, in 32 bits, against torch; the real one, quantised, against itself."""
    if request.param == "tiny":
        own, member = request.getfixturevalue("tiny")
        adapters, truth = (None,), lambda ids, _: torch_rows(own.model, ids, member.vocabulary_size)
    else:
        member, _ = request.getfixturevalue("members")
        adapters = None, 0
        truth = cache(lambda ids, adapter: contract.read(member.engine.open(adapter), list(ids)))
        monkeypatch.setattr(contract, "APART", 0.1)
        monkeypatch.setattr(contract, "LOGS_APART", 3)

    @contextmanager
    def poisoned(token: int) -> Iterator[None]:
        decode = Context.decode

        def checked(self, states, ids, wanted, least):
            if token in ids:
                raise RuntimeError("out of memory")
            return decode(self, states, ids, wanted, least)

        with monkeypatch.context() as patch:
            patch.setattr(Context, "decode", checked)
            yield

    def held() -> int:
        return sum(isinstance(thing, State) for thing in gc.get_objects())

    def right(ids: Sequence[int], adapter: int | None) -> Tensor:
        return truth(tuple(ids), adapter)

    ids = member.encoder.encode(TEXT).ids[:44]
    return Subject(member.engine, right, ids, poisoned, lambda sequence: sequence.lose(), held, adapters)


# Numbers


def logprobs(member: Member, text: str) -> Tensor:
    return contract.read(member.open(), member.encoder.plain(text))


def test_experts_of_a_file_are_the_merged_models(make_member, tmp_path):
    """On q, whose rows llama.cpp orders in pairs, and on down: against the merged models in torch."""
    specs = saved_experts(make_member("llama", 5), tmp_path)
    write_gguf(make_member("llama", 5), tmp_path / "base.gguf")
    right = Loader().members(specs)
    ours = Loader(engine="llama.cpp").members([spec.replace("base", "base.gguf", 1) for spec in specs])
    assert len({id(member.engine) for member in ours}) == 1
    assert len({member.fingerprint for member in ours}) == 3
    ids = right[0].encoder.plain(TEXT)[:40]
    for adapter, (member, other) in enumerate(zip(ours, right, strict=True)):
        member.engine._context(member.adapter).kind = 0
        found, expected = contract.read(member.open(), ids), torch_rows(other.merged(), ids, member.vocabulary_size)
        contract.assert_close(found, expected)
        if adapter:
            assert (found - torch_rows(right[0].model, ids, member.vocabulary_size)).abs().max() > 0.1


@pytest.mark.real
def test_the_starter_says_what_it_says_in_torch(members):
    """Within what rounding does to a model in four bits: mean KL divergence, and the scores of words."""
    others = Loader().members(starter.specs()[:2])
    for member, other in zip(members, others, strict=True):
        ids = member.encoder.plain(TEXT)
        assert ids == other.encoder.plain(TEXT)
        assert member.vocabulary.fingerprint == other.vocabulary.fingerprint
        assert (member.encoder.template, member.context_window) == (other.encoder.template, other.context_window)
        found, right = contract.read(member.open(), ids), contract.read(other.open(), ids)
        assert ((found.exp() * (found - right)).sum(-1)).mean() < 0.02
        given = [float(rows[range(len(ids) - 1), ids[1:]].mean()) for rows in (found, right)]
        assert given[0] == pytest.approx(given[1], abs=0.05)


def test_the_same_request_gives_the_same_numbers(members):
    pack = Pack(members, weighting="em", max_tokens=12, prefix_cache_mb=0)
    first, again = (pack.generate("What is the capital of France?") for _ in range(2))
    assert "Paris" in first.text
    assert (first.text, first.weights.values) == (again.text, again.weights.values)


def test_a_file_and_a_folder_of_one_family_fuse_token_by_token(tiny, make_member):
    own, ours = tiny
    other = make_member("llama", 0)
    prompts = ["Once upon a time", "The court"]
    answers, units = [], []
    for first in (own, ours):
        pack = Pack([first, other], weighting="uniform", chat_template=False, max_tokens=20)
        answers.append([g.text for g in (*pack.generate_batch(prompts), pack.generate("a" * 300))])
        units.append(pack.generate(prompts[0]).weights.unit)
        assert first.vocabulary.akin(other.vocabulary), len(first.vocabulary)
    assert answers[0] == answers[1]
    assert units == ["token", "token"]


# Cells


def context_of(member: Member) -> Context:
    return member.engine._context(member.adapter)


def test_a_context_grows_and_goes(tiny):
    """A long prompt, a fork of it and others beside: read as in torch; with the last one the memory is given back."""
    own, member = tiny
    ids = (member.encoder.plain(TEXT) * 20)[:500]
    gc.collect()
    sequences = [member.open() for _ in range(5)]
    found = member.engine.read([Read(sequence, ids, "last") for sequence in sequences])
    fork = sequences[0].fork()
    for sequence in sequences:
        sequence.crop(490)
    found += member.engine.read([Read(fork, ids[:2], "last"), Read(sequences[3], ids[490:], "last")])
    right = [torch_rows(own.model, row, member.vocabulary_size)[-1:] for row in (ids, [*ids, *ids[:2]])]
    for answer, expected in zip(found, [right[0]] * 5 + [right[1], right[0]], strict=True):
        contract.assert_close(answer, expected)
    assert context_of(member).cells == 4096
    del sequences, sequence, fork
    gc.collect()
    assert context_of(member).cells == 0
    contract.assert_close(contract.read(member.open(), ids, "last"), right[0])
    assert context_of(member).cells == FIRST


def test_forks_share_cells(tiny):
    own, member = tiny
    ids = (member.encoder.plain(TEXT) * 20)[:300]
    sequence = member.open()
    contract.read(sequence, ids, "none")
    forks = [sequence.fork() for _ in range(20)]
    found = member.engine.read([Read(fork, [i + 5], "last") for i, fork in enumerate(forks)])
    assert context_of(member).cells == FIRST
    for at in (0, 19):
        contract.assert_close(found[at], torch_rows(own.model, [*ids, at + 5], member.vocabulary_size)[-1:])


def test_more_sequences_than_slots(tiny):
    own, member = tiny
    ids = member.encoder.plain(TEXT)
    rows = [ids[at % 20 : at % 20 + 3 + at // 20] for at in range(SLOTS + 10)]
    sequences = [member.open() for _ in rows]
    for want in range(2):
        parts = [row[:2] if not want else row[2:] for row in rows]
        found = member.engine.read([Read(s, part, "last") for s, part in zip(sequences, parts, strict=True)])
    for row, answer in zip(rows, found, strict=True):
        contract.assert_close(answer, torch_rows(own.model, row, member.vocabulary_size)[-1:])


# Loading


def refused(path: Path | str, **words) -> str:
    with pytest.raises(LoadError) as caught:
        Loader(engine="llama.cpp", **words).members([path])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def content(tiny, tmp_path, make_member) -> bytes:
    write_gguf(make_member("llama", 3), tmp_path / "sound.gguf")
    return (tmp_path / "sound.gguf").read_bytes()


def test_nothing_is_written(tiny, tmp_path, monkeypatch, make_member):
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write_gguf(make_member("llama", 3), tmp_path / "tiny.gguf")
    (member,) = Loader(engine="llama.cpp").members([tmp_path / "tiny.gguf"])
    assert (member.name, member.context_window) == ("tiny", make_member("llama", 3).context_window)
    assert member.end_ids >= {2}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_model_in_parts(tmp_path, make_member):
    own = make_member("llama", 3)
    write_gguf(own, tmp_path / "tiny.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    for named in (parts[0], parts[-1]):
        (member,) = Loader(engine="llama.cpp").members([named])
        member.engine._context(None).kind = 0
        ids = member.encoder.plain(TEXT)[:20]
        contract.assert_close(contract.read(member.open(), ids), torch_rows(own.model, ids, member.vocabulary_size))
    parts[1].unlink()
    assert f"it is in {len(parts)} parts, and {parts[1].name} is not beside it" in refused(parts[0])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            b"llama.attention.layer_norm_rms_epsilon" + struct.pack("<If", 6, 1e-6),
            None,
            "aborts the process that loads it",
        ),
        (b"tokenizer.ggml.model", b"tokenizer.ggml.medol", "it has no vocabulary"),
        (
            struct.pack("<IQ", 8, 5) + b"llama",
            struct.pack("<IQ", 8, 5) + b"bark2",
            "unknown model architecture: 'bark2'",
        ),
        (b"blk.0.attn_norm.weight", b"blk.7.attn_norm.weight", "llama.cpp refuses it: "),
    ],
    ids=["assertion", "vocabulary", "architecture", "tensor"],
)
def test_a_file_that_llama_cpp_cannot_run(content, tmp_path, old, new, said):
    """Among them one over which it would end the process."""
    if new is None:
        old, new = old[:-4], old[:-4] + struct.pack("<f", -1.0)
        at = content.index(old)
        spoilt = content[:at] + new + content[at + len(new) :]
    else:
        assert old in content
        spoilt = content.replace(old, new, 1)
    (tmp_path / "x.gguf").write_bytes(spoilt)
    assert said in refused(tmp_path / "x.gguf")


def test_headers_with_random_faults(content, tmp_path):
    """Read as they are or refused with a typed error; the process lives on."""
    dice, outcomes = random.Random(5), []
    for _ in range(40):
        spoilt = bytearray(content[: dice.choice([len(content), len(content), dice.randrange(len(content))])])
        at = dice.randrange(24, min(900, len(spoilt) - 8)) if len(spoilt) > 64 else 0
        spoilt[at : at + 4] = dice.choice(
            [struct.pack("<I", dice.choice([0, 1, 3, 2**31, 2**32 - 1])), dice.randbytes(4)]
        )
        (tmp_path / "x.gguf").write_bytes(spoilt)
        try:
            (member,) = Loader(engine="llama.cpp").members([tmp_path / "x.gguf"])
            outcomes.append(contract.read(member.open(), [1, 2, 3]).shape[0] == 3)
        except (LoadError, VocabularyError) as error:
            outcomes.append(type(error))
    assert set(outcomes) >= {True, LoadError}


def test_what_no_gguf_file_has(tiny):
    with pytest.raises(OptionError, match=r"engine='vllm' is unknown; valid: llama.cpp, transformers"):
        Loader(engine="vllm")
    with pytest.raises(OptionError, match="dtype, model_kwargs, quantization and prepack are for transformers"):
        Loader(dtype="float32", engine="llama.cpp")


def test_other_versions_are_refused_by_name(monkeypatch, content, tmp_path, caplog):
    """And a file then runs in transformers, with a line that says what it costs."""
    monkeypatch.setattr(native, "installed", lambda: "0.2.90")
    monkeypatch.setattr(load_module, "installed", lambda: "0.2.90")
    native.binding.cache_clear()
    with pytest.raises(
        LoadError, match=rf"llama-cpp-python 0.2.90 is installed, but the llama.cpp engine needs {VERSION}"
    ):
        Loader(engine="llama.cpp")
    (member,) = Loader().members([tmp_path / "sound.gguf"])
    assert member.model.config.model_type == "llama"
    assert "sound.gguf runs in transformers: it is converted to float32 in the cache once, 0 MiB" in caplog.text
    monkeypatch.setattr(native, "installed", lambda: None)
    with pytest.raises(ExtraError, match=r"needs llama-cpp-python; install packllm\[llama-cpp\]"):
        Loader(engine="llama.cpp")
    monkeypatch.setattr(native, "installed", lambda: VERSION)
    monkeypatch.setitem(native._CONTEXT, "n_ctx", 513)
    with pytest.raises(LoadError, match="whose default n_ctx is 512, not 513"):
        Loader(engine="llama.cpp")


def test_an_adapter_that_does_not_fit(make_member, tmp_path):
    saved_experts(make_member("llama", 5), tmp_path)
    write_gguf(make_member("llama", 3), tmp_path / "base.gguf")
    config = tmp_path / "expert0" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "use_dora": True}))
    assert "it is more than plain LoRA, which llama.cpp cannot run; use engine='transformers'" in refused(
        f"{tmp_path / 'base.gguf'}+{tmp_path / 'expert0'}"
    )
    other = tmp_path / "other"
    other.mkdir()
    names = {"base_model.model.model.layers.9.mlp.down_proj": (3, 48, 32)}
    save_file(
        {
            f"{name}.lora_{p}.weight": torch.ones(s)
            for name, (r, i, o) in names.items()
            for p, s in (("A", (r, i)), ("B", (o, r)))
        },
        other / "adapter_model.safetensors",
    )
    (other / "adapter_config.json").write_text(json.dumps({**settings, "r": 3}))
    assert "which its base lacks; is it of another model?" in refused(f"{tmp_path / 'base.gguf'}+{other}")


def test_the_starter_pack():
    if starter.base_file() is None:
        pytest.skip(starter.WEIGHTS)
    pack = Pack.starter(engine="llama.cpp", max_tokens=8)
    assert [member.name for member in pack.members] == ["general", *starter.EXPERTS]
    assert pack.recipe["engine"] == "llama.cpp"
    answer = pack.generate("Which patients should not take aspirin?")
    assert answer.weights.top == "medicine"
    assert 0 < answer.usage.completion_tokens <= 8
