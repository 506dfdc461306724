"""What is evaluated on: rows of files and datasets, bad ones among them, and what is drawn of them."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from packllm.errors import DataError, ExtraError
from packllm_eval import choice, files, rows
from packllm_eval.rows import Document, Question


def documents(count: int) -> list[Document]:
    """Of two corpora in turn."""
    return [Document(str(i), ("two", "one")[i % 2], f"Text {i}.") for i in range(count)]


def test_rows_are_read_from_jsonl_and_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x y", "domain": "d"}\n{"question": "q?", "answer": "a"}\n')
    assert [(d.corpus, d.text) for d in rows.read_documents(tmp_path / "a.jsonl")] == [("d", "x y"), ("a", "q?\n\na")]
    paragraph = "word " * 250
    (tmp_path / "b.txt").write_text("\n\n".join([paragraph.strip()] * 4))
    found = rows.read_documents(tmp_path / "b.txt")
    assert [len(d.text) for d in found] == [1249, 1249, 1249, 1249]
    (tmp_path / "c.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": "B", "context": "c"}\n')
    (question,) = rows.read_questions(tmp_path / "c.jsonl")
    assert (question.answer, question.choices, question.context) == (1, ("a", "b"), "c")


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """hub:... of a local folder with these rows as its test split; the library keeps its copy in tmp_path."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(given):
        folder = tmp_path / "arc"
        folder.mkdir()
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
        return Path(f"hub:{folder}")

    return make


def test_questions_of_a_dataset_are_those_of_the_file(dataset, tmp_path):
    """ARC's form and MMLU's; the same rows in a file give the same questions."""
    plain = [{"question": f"q{i}", "choices": ["a", "b", "c"], "answer": i, "subject": "s"} for i in range(3)]
    path = dataset(plain)
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    assert rows.read_questions(path) == rows.read_questions(tmp_path / "arc.jsonl")
    assert rows.read_questions(Path(f"{path}::test")) == rows.read_questions(path)


def test_arc_s_form_is_read(dataset):
    given = {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    path = dataset([given, {**given, "answerKey": "3"}])
    (question,) = rows.read_questions(path, "skip")
    assert (question.corpus, question.choices, question.answer) == ("arc", ("a", "b"), 1)
    with pytest.raises(DataError, match=r"line 2: answer='3' must be 0\.\.1"):
        rows.read_questions(path)


def test_documents_of_a_dataset(dataset):
    (document,) = rows.read_documents(dataset([{"text": "A text."}]))
    assert (document.corpus, document.text) == ("arc", "A text.")


def test_a_dataset_that_cannot_be_had_is_named(dataset, tmp_path, monkeypatch):
    path = dataset([{"text": "A text."}])
    with pytest.raises(DataError, match=r"cannot load dataset .*absent"):
        rows.read_documents(Path(f"hub:{tmp_path}/absent"))
    with pytest.raises(DataError, match='Unknown split "dev"'):
        rows.read_documents(Path(f"{path}::dev"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ExtraError, match=r"packllm\[eval\]"):
        rows.read_documents(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "empty"),
        ("{", "line 2: Expecting"),
        ("[1]", "not a JSON object"),
        ('{"question": " "}', "no question"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "at least two"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', r"answer=2 must be 0\.\.1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": -1}', "answer=-1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "C"}', "answer='C'"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer=True"),
    ],
)
def test_malformed_rows_are_named_by_line_or_skipped(tmp_path, caplog, line, reason):
    good = '{"question": "q", "choices": ["a", "b"], "answer": 0}'
    path = tmp_path / "q.jsonl"
    path.write_text(f"{good}\n{line}\n{good}x\n"[:-2] + "\n" if line else f"{good}\n\n{good}\n")
    with pytest.raises(DataError, match=f"q.jsonl line 2.*{reason}" if "line 2" not in reason else reason):
        rows.read_questions(path)
    assert len(rows.read_questions(path, bad="skip")) == 2
    assert "line 2 left out" in caplog.text


def test_files_that_hold_nothing(tmp_path):
    (tmp_path / "e.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match="has no rows"):
        rows.read_documents(tmp_path / "e.txt")
    with pytest.raises(DataError, match="is no file"):
        rows.read_documents(tmp_path / "absent.jsonl")
    (tmp_path / "t.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="line 1: its text is empty"):
        rows.read_documents(tmp_path / "t.jsonl")


def test_a_folder_is_one_corpus_of_all_its_texts(tmp_path):
    notes = tmp_path / "notes"
    (notes / "deep").mkdir(parents=True)
    (notes / ".git").mkdir()
    (tmp_path / "bare").mkdir()
    (notes / "b.md").write_text("# Insulin\n\nlowers glucose")
    (notes / "deep" / "a.txt").write_text("The court")
    (notes / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "A query"}\n{"text": "A plan", "domain": "db"}\n'))
    (notes / "empty.txt").write_text("")
    (notes / ".git" / "hidden.txt").write_text("hidden")
    (notes / "picture.png").write_bytes(b"\x89PNG")
    found = rows.read_documents(notes)
    texts = ["# Insulin\n\nlowers glucose", "A query", "A plan", "The court"]
    assert [(d.corpus, d.text) for d in found] == list(zip(["notes", "notes", "db", "notes"], texts, strict=True))
    assert files.names([notes, notes / "b.md"]) == ["notes", "b"]
    with pytest.raises(DataError, match=r"contains no \.jsonl, \.txt or \.md file"):
        rows.read_documents(tmp_path / "bare")


def test_samples_are_drawn_by_the_seed_and_never_silently_small():
    found = rows.sample(documents(10), 3, 0, 200)
    assert found == rows.sample(documents(10), 3, 0, 200) != rows.sample(documents(10), 3, 1, 200)
    assert [d.corpus for d in found] == ["two"] * 3 + ["one"] * 3
    assert len(rows.sample(documents(10), None, 0, 200)) == 10
    with pytest.raises(DataError, match="'two' has 5 rows, fewer than the 6 asked for"):
        rows.sample(documents(10), 6, 0, 200)


@pytest.mark.parametrize("letter", ["B", 1])
def test_records_of_another_answer_are_not_taken_for_this_one(tmp_path, letter):
    """Everything that a result depends on is in the id: the corpus, the answer, the subject."""
    row = {"question": "q", "choices": ["a", "b"], "answer": 0}

    def key(name: str = "q.jsonl", **changed: object) -> str:
        (tmp_path / name).write_text(json.dumps({**row, **changed}))
        return rows.read_questions(tmp_path / name)[0].id

    assert key() == key()
    assert len({key(), key(answer=letter), key(subject="law"), key(split="dev"), key("other.jsonl")}) == 5
    texts = [rows.read_documents(path)[0].id for path in (_text(tmp_path / "a.txt"), _text(tmp_path / "b.txt"))]
    assert texts[0] != texts[1]


def _text(path: Path, content: bytes = b"The same.") -> Path:
    path.write_bytes(content)
    return path


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / folder / "test.jsonl" for folder in ("law", "food")]
    assert files.names([*paths, tmp_path / "own.txt"]) == ["law-test", "food-test", "own"]
    assert files.names([Path("hub:a/mmlu:law"), Path("hub:b/arc")]) == ["mmlu-law", "arc"]
    same = [Path("hub:a/mmlu:law"), Path("hub:a/mmlu:law:dev")]
    assert files.names(same) == ["a-mmlu-law", "a-mmlu-law-dev"]
    with pytest.raises(DataError, match="two of the files are called 'law-test'"):
        files.names([paths[0], paths[0]])


def test_a_byte_order_mark_and_windows_lines_are_no_text(tmp_path):
    path = _text(tmp_path / "m.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert [d.text for d in rows.read_documents(path)] == ["one", "two"]
    (document,) = rows.read_documents(_text(tmp_path / "m.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"))
    assert document.text == "one\ntwo"


def test_bytes_that_are_no_text_are_named(tmp_path, caplog):
    path = _text(tmp_path / "latin.jsonl", b'{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl line 2: 'utf-8' codec can't decode"):
        rows.read_documents(path)
    assert [d.text for d in rows.read_documents(path, "skip")] == ["one"]
    assert "line 3 left out: 'utf-8' codec can't encode" in caplog.text  # half a surrogate pair
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        rows.read_documents(_text(tmp_path / "latin.txt", b"caf\xe9"))
    packed = gzip.compress(b'{"text": "one"}\n' * 99)
    for content in (b"no archive", packed[:-9]):
        with pytest.raises(DataError, match=r"z\.jsonl\.gz is damaged"):
            rows.read_documents(_text(tmp_path / "z.jsonl.gz", content), "skip")
    with pytest.raises(DataError, match=r"rows\.json is no text; give a \.jsonl file"):
        rows.read_documents(_text(tmp_path / "rows.json", b'[{"text": "one"}]'))


def test_answers_of_generation_may_be_numbers(tmp_path):
    path = _text(tmp_path / "s.jsonl", b'{"question": "2 + 2?", "answer": 4}\n')
    assert rows.read_questions(path, choices=False)[0].answer == "4"
    with pytest.raises(DataError, match="'answer' must be a text or a number"):
        rows.read_questions(_text(path, b'{"question": "q", "answer": [4]}\n'), choices=False)
    with pytest.raises(DataError, match=r"answer='1' must be 0\.\.1 \(a number\)"):
        rows.read_questions(_text(path, b'{"question": "q", "choices": ["a", "b"], "answer": "1"}\n'))


def made(count: int, subject: str = "", split: str = "") -> list[Question]:
    return [Question(f"{subject}{split}{i}", "quiz", f"{i}?", (), "1", "", subject, split) for i in range(count)]


def test_worked_examples_are_never_asked():
    dev, law, food = made(3, "law", "dev"), made(9, "law", "test"), made(9, "food", "test")
    asked, told = choice.draw([*dev, *law, *food], None, 2, 0)
    assert {*told} == {"law", "food"}
    assert all(row in dev for row in told["law"])
    assert all(row in food and row not in asked for row in told["food"])
    assert len(asked) == 9 + 9 - 2
    assert choice.draw(law, 4, 0, 1)[0] == rows.sample(law, 4, 1, 256)


def test_rows_for_worked_examples_must_be_there():
    with pytest.raises(DataError, match="shots=4 needs more examples: 'quiz' has 3 rows of subject 'law'"):
        choice.draw([*made(3, "law", "dev"), *made(9, "law", "test")], None, 4, 0)
    with pytest.raises(DataError, match="shots=5 needs more examples: 'quiz' has 5 rows; lower it"):
        choice.draw(made(5), None, 5, 0)
    asked, told = choice.draw(made(6), None, 5, 0)
    assert (len(asked), len(told[""])) == (1, 5)
    with pytest.raises(DataError, match="has only examples"):
        choice.draw(made(5, split="dev"), None, 0, 0)
