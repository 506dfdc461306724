"""How well one vocabulary covers another, and packllm align."""

from __future__ import annotations

import gzip
import json

import pytest
from typer.testing import CliRunner

from packllm import coverage
from packllm.align import Vocabulary, mined
from packllm.align.mined import alignment
from packllm.cli import app
from packllm.errors import LoadError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACKLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def folders(byte_tokenizer, word_tokenizer, tmp_path_factory) -> tuple[str, str]:
    """Folders of two tokenizers."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (("bytes", byte_tokenizer), ("words", word_tokenizer)):
        tokenizer.save_pretrained(root / name)
    return str(root / "bytes"), str(root / "words")


def test_the_figures_are_those_of_the_mapping(folders, byte_tokenizer, word_tokenizer):
    found = coverage.measure(*folders)
    one, two = Vocabulary.from_tokenizer(byte_tokenizer), Vocabulary.from_tokenizer(word_tokenizer)
    texts = {two.tokens[i] for i in two.text}
    assert found.exact == sum(one.tokens[i] in texts for i in one.text)
    assert found.text == len(one.text)
    assert found.sizes == (len(one), len(two))
    assert found.matched + found.alone + found.text == len(one)
    assert (found.reference, found.target) == ("bytes", "words")
    far = max(alignment(one, two).distances.tolist())
    assert found.worst[0][2] == max(found.distances) == far
    assert [d for *_, d in found.worst] == sorted((d for *_, d in found.worst), reverse=True)


def test_the_table(folders):
    result = CliRunner().invoke(app, ["align", *folders])
    assert result.exit_code == 0, result.output
    found = coverage.measure(*folders)
    line = next(line for line in result.stdout.splitlines() if "exact" in line)
    assert f"{found.exact:,}" in line
    assert f"{found.exact / found.text:.1%}" in line
    assert "bytes" in result.stdout
    assert "special tokens matched by role" in result.stdout
    assert found.worst[0][0] in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stderr == ""


def test_json(folders):
    result = CliRunner().invoke(app, ["align", *folders, "--json"])
    assert json.loads(result.stdout) == json.loads(json.dumps(coverage.measure(*folders).as_dict()))


def test_a_vocabulary_covers_itself(folders):
    found = coverage.measure(folders[0], folders[0])
    assert found.exact == found.text == found.sizes[0]
    assert (found.worst, found.matched, found.alone) == ([], 0, 0)


def test_files_and_folders_without_a_configuration(folders, tmp_path, byte_tokenizer):
    content = byte_tokenizer.backend_tokenizer.to_str().encode()
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "other.json.gz").write_bytes(gzip.compress(content, mtime=0))
    whole = coverage.read(folders[0])
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "other.json.gz"):
        read = coverage.read(str(path))
        assert read.same_as(whole)
    assert whole.special["end_of_turn"] == 2  # a bare file does not tell roles
    assert mined(coverage.read(str(tmp_path)), whole).tolist() == list(range(len(whole)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.json", b"", "is no tokenizer.json"),
        ("other.json", b'{"a": 1}', "is no tokenizer.json"),
        ("list.json", b"[1]", "is no tokenizer.json"),
        ("cut.json.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "is no tokenizer.json"),
        ("model.gguf", b"no model at all", "model.gguf"),
        (None, None, "cannot load a tokenizer from"),
    ],
)
def test_what_is_no_tokenizer_is_refused(folders, tmp_path, name, content, message):
    path = tmp_path / (name or "absent")
    if name:
        path.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        coverage.read(str(path))
    result = CliRunner().invoke(app, ["align", folders[0], str(path)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_help():
    result = CliRunner().invoke(app, ["align", "--help"])
    assert "packllm align ./smollm2" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
