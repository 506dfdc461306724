"""Distillation: what the pack says of texts, taught to one member."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from conftest import CORPUS
from naive import next_logprobs
from safetensors.torch import load_file
from test_family import by_bytes
from test_family import member as relative
from transformers import AutoModelForCausalLM, Trainer
from typer.testing import CliRunner

from packllm import Pack, errors
from packllm.cli import app
from packllm.engines.transformers.merge import average
from packllm.options import Options
from packllm.weights import em
from packllm_eval.distill import Training, distill, teacher
from packllm_eval.distill.student import Loss
from packllm_eval.distill.teacher import Lesson, in_ids_of, read, teach
from packllm_eval.rows import Document

TEXTS = list(dict.fromkeys(CORPUS))
LAW = "The court shall order relief under chapter 7 unless the debtor objects within 30 days of the notice."


def documents(texts=TEXTS, corpus="c") -> list[Document]:
    return [Document(f"{corpus}{at:04x}", corpus, text) for at, text in enumerate(texts)]


@pytest.fixture
def pair(make_member) -> list:
    return [make_member("llama", 0, name="a"), make_member("llama", 1, name="b")]


def whole(members, text: str) -> tuple[Lesson, dict[str, float]]:
    """A lesson that keeps every token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "TOP", 10**6)
        return read(members, text, 512, Options())


# The teacher


def test_a_lesson_is_the_mixture_under_em_of_the_whole_text(pair):
    lesson, weights = whole(pair, LAW)
    ids = pair[0].encoder.plain(LAW)
    after = [torch.stack([next_logprobs(m, ids[: i + 1]) for i in range(len(ids) - 1)]) for m in pair]
    given = torch.stack([rows.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] for rows in after])
    expected = em(given)
    assert [weights["a"], weights["b"]] == pytest.approx(expected, abs=1e-4)
    assert lesson.ids.tolist() == ids
    assert lesson.places.tolist() == list(range(len(ids) - 1))
    fused = sum(w * rows.exp() for w, rows in zip(expected, after, strict=True))
    taught = torch.zeros_like(fused).scatter(-1, lesson.top, lesson.logprobs.exp())
    torch.testing.assert_close(taught, fused, atol=1e-4, rtol=1e-3)
    kept, _ = read(pair, LAW, 512, Options())
    assert kept.top.shape == (len(ids) - 1, teacher.TOP)
    torch.testing.assert_close(kept.logprobs, fused.log().topk(teacher.TOP).values, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kinds", [("base", "chat"), ("shifted", "base", "pad")])
def test_a_family_teaches_in_the_students_ids_with_one_end(kinds):
    """What is taught of each text token, by its bytes, and of the end, is the mixture of the members' own."""
    members = [relative(kind, seed) for seed, kind in enumerate(kinds)]
    lesson, weights = whole(in_ids_of(members[0], members), "Insulin helps")
    first = members[0]
    for at, place in enumerate(lesson.places.tolist()):
        seen = [first.vocabulary.tokens[i] for i in lesson.ids[: place + 1].tolist()]
        parts = []
        for one in members:
            id_of = {token: i for i, token in enumerate(one.vocabulary.tokens) if one.vocabulary.is_text(i)}
            part = by_bytes(one, [id_of[token] for token in seen])
            parts.append({token: p / sum(part.values()) for token, p in part.items()})
        taught = dict(zip(lesson.top[at].tolist(), lesson.logprobs[at].exp().tolist(), strict=True))
        for token in (b" ", b"e", b""):
            i = min(first.end_ids) if not token else first.vocabulary.tokens.index(token)
            expected = sum(weights[m.name] * part[token] for m, part in zip(members, parts, strict=True))
            assert taught[i] == pytest.approx(expected, rel=1e-3)


def test_members_without_weight_stop_reading(pair, monkeypatch):
    """Under em; weights that name members need all of them."""
    text = TEXTS[1] * 3
    monkeypatch.setattr(teacher, "FIRST", 8)

    def counts(**options) -> tuple[list[int], Lesson, dict[str, float]]:
        before = [member.engine.tokens for member in pair]
        lesson, weights = read(pair, text, 512, Options(**options))
        return [member.engine.tokens - one for member, one in zip(pair, before, strict=True)], lesson, weights

    read_, lesson, weights = counts(min_weight=0.5)
    (best,) = weights
    one, other = sorted(read_)
    assert weights == {best: 1.0}
    assert one < 16 < len(lesson.ids) < other
    alone, _ = read([m for m in pair if m.name == best], text, 512, Options())
    assert lesson.top[:, 0].tolist() == alone.top[:, 0].tolist()
    read_, lesson, weights = counts(weighting={"a": 0.995, "b": 0.005})
    assert min(read_) == len(lesson.ids)
    assert weights == {"a": 1.0, "b": 0.0}


# What is learnt


def test_the_loss_is_the_divergence_of_tokens_and_rest(pair):
    """By hand, over four tokens that are kept and the rest as one; and over all of them torch's own."""
    member, size = pair[0], pair[0].vocabulary_size
    torch.manual_seed(0)
    logits = torch.randn(3, member.model.config.vocab_size)
    unused = sorted(member.vocabulary.unused)
    pack = torch.randn(2, size).index_fill(-1, torch.tensor(unused, dtype=torch.long), -math.inf).log_softmax(-1)
    own = member.real(logits).log_softmax(-1)[1:]
    lesson = Lesson(torch.zeros(3), torch.tensor([1, 2]), *reversed(pack.topk(4)))
    p, q = (torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1) for kept in
            (pack.gather(-1, lesson.top).exp(), own.gather(-1, lesson.top).exp()))  # fmt: skip
    by_hand = (p * (p / q).log()).sum(-1).mean()
    assert Loss(member)(logits[None], [lesson]).item() == pytest.approx(by_hand.item(), rel=1e-4)
    every = [i for i in range(size) if i not in unused]
    full = Lesson(lesson.ids, lesson.places, torch.tensor([every] * 2), pack[:, every])
    exact = torch.nn.functional.kl_div(own[:, every], pack[:, every], reduction="batchmean", log_target=True)
    assert Loss(member)(logits[None], [full]).item() == pytest.approx(exact.item(), rel=1e-3)
    assert by_hand < exact


def test_several_ends_are_learnt_as_one(pair):
    """A student that gives the end to another of its own end ids has nothing to learn of it."""
    member = pair[0]
    logits = torch.zeros(1, 1, member.model.config.vocab_size)
    end, other = 5, 9
    logits[..., other], logits[..., end] = 8.0, -30.0
    share = member.real(logits)[0].log_softmax(-1)[0, other]
    lesson = Lesson(torch.zeros(1), torch.tensor([0]), torch.tensor([[end]]), share[None, None])
    assert Loss(member, (end, other))(logits, [lesson]).item() == pytest.approx(0, abs=1e-4)
    assert Loss(member)(logits, [lesson]).item() > 1


@pytest.mark.parametrize("full", [False, True])
def test_the_student_comes_near_the_pack_and_loads_anywhere(pair, tmp_path, full):
    member = pair[0]
    member.model.save_pretrained(tmp_path / "base")
    member.tokenizer.save_pretrained(tmp_path / "base")
    pack = Pack.load([f"a={tmp_path / 'base'}", pair[1]])
    out = tmp_path / "out"
    training = Training(full=full, epochs=15, batch_size=3, rate=2e-2 if not full else 5e-3)
    result = distill(pack, "a", documents(), documents(corpus="same"), out, training)  # learnt by heart
    (closed,) = result.closed
    assert closed.pack < closed.before
    assert closed.share > 0.3, closed
    found = {entry.method: entry.score.value for entry in result.table}
    assert found["member a"] == closed.before
    assert found["member distilled"] == closed.after
    spec = f"{tmp_path / 'base'}+{out}" if not full else str(out)
    loaded = Pack.load([spec], chat_template=False)
    expected = Pack([result.member], chat_template=False).score("The court", [" shall order"])
    assert loaded.score("The court", [" shall order"]) == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(Pack([member], chat_template=False).score("The court", [" shall order"]), abs=0.1)
    ids = torch.tensor([member.encoder.plain(LAW)])
    if full:
        plain = AutoModelForCausalLM.from_pretrained(out)
    else:
        peft = pytest.importorskip("peft")
        plain = peft.AutoPeftModelForCausalLM.from_pretrained(out)  # finds its base by itself
    with torch.inference_mode():
        torch.testing.assert_close(plain.eval()(ids).logits, result.member.model(ids).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("full", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_weights(pair, tmp_path, monkeypatch, full):
    training, name = Training(full=full, epochs=3), "model.safetensors" if full else "adapter_model.safetensors"
    distill(Pack(pair), "a", documents(), documents(TEXTS[:2], "o"), tmp_path / "at once", training)
    steps, reads = [], []
    step, lesson = Trainer.training_step, teacher.read

    def fails(self, *args, **words):
        steps.append(self.state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **words)

    def counted(*args):
        reads.append(args)
        if len(reads) == 3:
            raise KeyboardInterrupt
        return lesson(*args)

    monkeypatch.setattr(Trainer, "training_step", fails)
    monkeypatch.setattr(teacher, "read", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            distill(Pack(pair), "a", documents(), documents(TEXTS[:2], "o"), tmp_path / "again", training)
    (tmp_path / "again" / "work" / "checkpoints" / "checkpoint-99").mkdir()  # killed while it was written
    distill(Pack(pair), "a", documents(), documents(TEXTS[:2], "o"), tmp_path / "again", training)
    assert len(reads) == len(TEXTS) + 1
    assert steps[:6] == [0, 1, 2, 3, 4, 5]
    assert steps[6:] == [5, 6, 7, 8]  # three epochs of three steps
    once, again = (load_file(tmp_path / run / name) for run in ("at once", "again"))
    assert once.keys() == again.keys()
    assert all(torch.equal(once[key], again[key]) for key in once)
    distill(Pack(pair), "a", documents(), documents(TEXTS[:2], "o"), tmp_path / "again", training)
    assert len(steps) == 10  # it is done
    other = Training(full=full, epochs=1)
    distill(Pack(pair), "a", documents(), documents(TEXTS[:2], "o"), tmp_path / "again", other)
    assert len(steps) == 13  # another training of the same lessons
    assert len(reads) == len(TEXTS) + 1


def test_another_vocabulary_teaches_through_mined_and_its_loss_is_told(make_member, tmp_path):
    members = [make_member("llama", 0, name="a"), make_member("llama", 1, "words", name="w")]
    result = distill(Pack(members), "a", documents(), documents(TEXTS[:3], "o"), tmp_path, Training(epochs=1))
    rows = {entry.method for entry in result.table}
    assert {"member a", "member w", "member w in a's tokens", "member distilled", "the pack"} <= rows
    assert result.lessons["weights"].keys() == {"a", "w"}
    assert sum(result.lessons["weights"].values()) == pytest.approx(1)


# Bad input, and the command line


def test_bad_input_is_refused_with_a_remedy(pair, tmp_path, monkeypatch):
    pack = Pack(pair)

    def refused(error, match, docs=None, name="a", **training):
        with pytest.raises(error, match=match):
            distill(pack, name, documents() if docs is None else docs, documents(), tmp_path, Training(**training))

    refused(errors.DataError, r"the corpus has 1 texts, fewer than batch_size=2; give more", documents()[:1])
    refused(errors.DataError, "the corpus has 0 texts", [])
    short = [*documents()[:1], *documents(["a", "b", "c"], "s")]
    refused(errors.DataError, r"3 of 4 texts cannot be used \(.*too short.*leaves 1 texts, fewer than", short)
    refused(errors.OptionError, r"student='A' is no member.*Members: a, b", name="A")
    for wrong in ({"epochs": 0}, {"rank": 0}, {"batch_size": 0}, {"rate": 0.0}, {"rate": math.nan}):
        refused(errors.OptionError, f"{next(iter(wrong))}=.* must be", **wrong)
    teach(pair, Options(), documents()[:2], tmp_path / "kept", length=64, batch=1)
    with pytest.raises(errors.DataError, match="another length"):
        teach(pair, Options(), documents()[:2], tmp_path / "kept", length=32, batch=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(errors.ExtraError, r"needs peft; install packllm\[distill\]")


@pytest.fixture
def experts(make_member, tmp_path) -> Pack:
    """A base and two adapters of it."""
    from peft import LoraConfig, get_peft_model

    member = make_member("llama", 0)
    base = tmp_path / "base"
    member.model.save_pretrained(base)
    member.tokenizer.save_pretrained(base)
    for rank, (name, modules) in enumerate({"law": ["q_proj"], "food": ["q_proj", "down_proj"]}.items(), 2):
        torch.manual_seed(rank)
        lora = LoraConfig(r=rank, target_modules=modules, init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / name)
    return Pack.load([str(base), *(f"{base}+{tmp_path / name}" for name in ("law", "food"))])


def test_the_base_starts_from_the_mean_of_its_adapters(experts, tmp_path):
    result = distill(experts, "base", documents()[:2], documents(), tmp_path / "o", Training(epochs=1, rate=1e-12))
    merged = average(experts.members[1:])
    ids = torch.tensor([merged.encoder.plain(LAW)])
    with torch.inference_mode():
        expected = merged.model(ids).logits
        torch.testing.assert_close(result.member.model(ids).logits, expected, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(experts.members[0].model(ids).logits, expected, atol=0.5)
    cold = distill(experts, "base", documents()[:2], documents(), tmp_path / "p", Training(rank=2, rate=1e-12))
    assert cold.closed[0].after == pytest.approx(cold.closed[0].before, abs=1e-4)


def test_an_adapter_learns_whole_only(experts, tmp_path):
    with pytest.raises(errors.OptionError, match="'law' is an adapter already; name its base"):
        distill(experts, "law", documents(), documents(), tmp_path / "o")
    result = distill(experts, "law", documents()[:2], documents(), tmp_path / "o", Training(full=True, epochs=1))
    assert result.closed[0].after != result.closed[0].before


def test_on_the_command_line(pair, tmp_path):
    for member in pair:
        member.model.save_pretrained(tmp_path / member.name)
        member.tokenizer.save_pretrained(tmp_path / member.name)
    texts, others = tmp_path / "texts.jsonl", tmp_path / "others.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:5]))
    others.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[3:]))

    def run(*words):
        models = ("-m", tmp_path / "a", "-m", tmp_path / "b")
        return CliRunner().invoke(app, [str(word) for word in ("distill", texts, *models, *words)])

    given = ("--student", "a", "--out", tmp_path / "o", "--held-out", others, "--epochs", "1")
    told = json.loads(run(*given, "--json").stdout)
    assert told["lessons"]["texts"] == 3  # two are held out
    assert [one["corpus"] for one in told["closed"]] == ["others"]
    shown = run(*given)
    assert shown.exit_code == 0, shown.output
    assert "member distilled" in shown.stdout
    assert "of the way to the pack's" in shown.stdout
    spec = f"one={tmp_path / 'a'}+{tmp_path / 'o'}"
    evaluated = CliRunner().invoke(app, [str(word) for word in (
        "eval", "lm", others, "-m", tmp_path / "a", "-m", tmp_path / "b", "--method", "em", "--average",
        "--beside", spec, "--no-plots", "--report", tmp_path / "r",
    )])  # fmt: skip
    assert evaluated.exit_code == 0, evaluated.output
    (table,) = json.loads((tmp_path / "r" / "report.json").read_text()).values()
    score = {entry["method"]: entry["value"] for entry in table}
    assert score.keys() >= {"member a", "member b", "member one", "member average", "em", "best member"}
    assert score["best member"] == min(score["member a"], score["member b"])  # those beside the pack are no candidates
    wrong = run("--student", "law", "--out", tmp_path / "p")
    assert wrong.exit_code == 2
    assert "student='law' is no member" in " ".join(wrong.output.split())
