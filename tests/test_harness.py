"""The lm-evaluation-harness adapter: on small task files and local data, offline, and equal to direct scoring."""

from __future__ import annotations

import json
import math
import random

import pytest
from conftest import TextPack as Pack

from packllm import OptionError, PackError
from packllm_eval import choice, rows

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is absent: pip install packllm[lm-eval]")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from packllm_eval.harness import CHAT, PackLM, generation_options

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{body}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATE = """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: question
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list:
  - metric: exact_match
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture(scope="module")
def small(make_member) -> Pack:
    return Pack([make_member("llama", 0), make_member("gpt2", 1)])


def request(*arguments):
    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="module")
def results(small, tmp_path_factory):
    """The harness's results on three tasks over one file, and the file."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["Paris", "the dog", "an index scan", "insulin and glucose", "30 days", "yes"]
    rng = random.Random(0)
    quiz = [
        {"question": f"Which of these is number {i}?", "choices": rng.sample(words, 3), "answer": rng.randrange(3)}
        for i in range(12)
    ]
    data = folder / "quiz.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in quiz))
    for name, body in (("quiz", CHOICE), ("writes", GENERATE), ("models", ROLLING)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, body=body))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HOME", str(folder / "cache"))
        found = lm_eval.simple_evaluate(
            PackLM(small), tasks=["quiz", "writes", "models"], task_manager=manager, bootstrap_iters=0
        )
    return found, data


def test_accuracy_and_scores_agree_with_ours(results, small, tmp_path):
    found, data = results
    records = choice.evaluate(small, rows.read_questions(data), tmp_path / "r.jsonl", methods=["em"], template="plain")
    ours = {r["id"]: r["methods"]["em"]["nats"] for r in records}
    key = {q.question: q.id for q in rows.read_questions(data)}
    for sample in found["samples"]["quiz"]:
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx(ours[key[sample["doc"]["question"]]], rel=1e-4)
    hits = [choice.right(r, r["methods"]["em"]["nats"]) for r in records]
    assert found["results"]["quiz"]["acc,none"] == pytest.approx(sum(hits) / len(hits))
    assert 0 < sum(hits) < len(hits)


def test_generation_is_the_packs(results, small):
    found, _ = results
    for sample in found["samples"]["writes"][:3]:
        prompt = f"Question: {sample['doc']['question']}\nAnswer:"
        assert sample["resps"][0][0] == small.generate(prompt, max_tokens=5, stop="\n").text


def test_rolling_is_the_sum_of_segments(results, small):
    found, data = results
    texts = [row.question for row in rows.read_questions(data)]
    nats = [PackLM(small).loglikelihood_rolling([request(text)], disable_tqdm=True)[0] for text in texts]
    expected = -sum(nats) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["results"]["models"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    assert nats[0] == pytest.approx(small.score("\n", [texts[0]])[0])


def test_rolling_covers_long_texts_within_the_window(small):
    text = " ".join(f"word {i} of the court" for i in range(200))
    asked = []

    class Spy:
        members, context_window = small.members, 64

        def score(self, context, continuations):
            asked.append((context, continuations[0]))
            tokens = small.count_tokens(context) + small.count_tokens(continuations[0])
            assert tokens <= 64
            return [-1.0]

    total = PackLM(Spy()).loglikelihood_rolling([request(text)], disable_tqdm=True)[0]
    assert "".join(continuation for _, continuation in asked) == text
    assert total == -len(asked)


def test_greedy_continuations_are_marked(small):
    written = small.generate("The court", max_tokens=6).text
    first = small.generate("The court", max_tokens=1).text
    model = PackLM(small)
    found = model.loglikelihood(
        [request("The court", " zebra"), request("The court", first), request("A query", " planner")],
        disable_tqdm=True,
    )
    assert [greedy for _, greedy in found][:2] == [False, True]
    assert written.startswith(first)
    assert found[0][0] == pytest.approx(small.score("The court", [" zebra"])[0])
    assert math.isfinite(model.loglikelihood([request("", "The")], disable_tqdm=True)[0][0])


def test_chat_goes_through_each_members_template(small):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <|im_end|>"}]
    model = PackLM(small)
    context = model.apply_chat_template(messages)
    assert context.startswith(CHAT)
    (found,) = model.loglikelihood([request(context, " the dog")], disable_tqdm=True)
    assert found[0] == pytest.approx(small.score(messages, [" the dog"])[0])
    arguments = {"until": ["\n"], "max_gen_toks": 4}
    (text,) = model.generate_until([request(context, arguments)], disable_tqdm=True)
    assert text == small.generate(messages, max_tokens=4, stop="\n").text
    with pytest.raises(OptionError, match="prefill"):
        model.apply_chat_template(messages, add_generation_prompt=False)


def test_generation_arguments():
    assert generation_options({"until": "\n", "do_sample": False, "temperature": 0.7}) == {
        "max_tokens": 256,
        "stop": ("\n",),
        "temperature": 0.0,
    }
    sampled = generation_options({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 9})
    assert sampled == {"max_tokens": 9, "stop": (), "temperature": 0.7, "top_p": 0.9}


def test_bad_arguments(small):
    model = PackLM(small)
    with pytest.raises(OptionError, match="unknown option 'num_beams'"):
        model.generate_until([request("a", {"num_beams": 4})], disable_tqdm=True)
    with pytest.raises(OptionError, match="not both"):
        PackLM(small, weighting="em")
    with pytest.raises(PackError, match="does not exist"):
        PackLM(models="no/such/./model;b", batch_size=1)


def test_the_model_is_registered():
    from lm_eval.api.registry import get_model

    assert get_model("packllm") is PackLM
