"""Write the evaluation texts of `docs/results.md`: documents on which no expert of the study was trained.

    python examples/held_out.py --shared ../shared --out study

Medicine, law and databases: the one document in twenty that `train_expert.py` held out of the starter
experts' corpora, by the same hash. Maths: the half of GSM8K that it held out of the maths expert
(--hold-out 2). Code: files of Python's standard library, for which the pack has no expert. Mixed: the first half of one
held-out document followed by the second half of another domain's. For the study of eight members also
`cpp`, headers that come with torch, `numerics`, docstrings of numpy, scipy and scikit-learn, and
`mixed_all`, of all seven domains. Also writes what the experts of the study are trained on (`gsm8k.jsonl`,
`train/`) and `corpora/`, a sample of each expert's training documents for cbtm and the router.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from train_expert import Document, read_documents

CORPORA = {
    "medicine": ("corpora/medicine_medquad.jsonl.gz", "focus"),
    "law": ("corpora/law_uscode.txt.gz", None),
    "databases": ("corpora/databases_postgresql15.txt.gz", None),
}
LEAST = 800  # characters of a document
FITTED = 300  # training documents per domain, for cbtm and the router


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with corpora/ and eval/")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    maths = args.out / "gsm8k.jsonl"
    write(maths, gsm8k(args.shared / "eval" / "gsm8k_test.jsonl.gz"))
    corpora = {name: read_documents(args.shared / path, group) for name, (path, group) in CORPORA.items()}
    corpora["maths"] = read_documents(maths, "question", 2)
    held_out = {name: joined(d.text for d in documents if d.held_out) for name, documents in corpora.items()}
    held_out["code"] = [cut for path in standard_library() for cut in code(path)]
    held_out["mixed"] = mixed(held_out)
    training = {"code": code_of_python, "cpp": headers, "numerics": docstrings}
    for name, texts_of in training.items():
        write(args.out / "train" / f"{name}.jsonl", texts_of())
    for name in ("cpp", "numerics"):
        documents = read_documents(args.out / "train" / f"{name}.jsonl", "file", 10)
        held_out[name] = joined(d.text for d in documents if d.held_out)
    held_out["mixed_all"] = mixed({name: texts for name, texts in held_out.items() if name != "mixed"})
    for name, texts in held_out.items():
        write(args.out / f"{name}.jsonl", ({"text": text} for text in texts))
    for name, documents in corpora.items():
        train = [d.text for d in documents if not d.held_out]
        texts = random.Random(0).sample(train, min(FITTED, len(train)))
        write(args.out / "corpora" / f"{name}.jsonl", ({"text": text} for text in texts))
    other = [cut for path in standard_library("*/*.py") for cut in code(path)]
    write(args.out / "corpora" / "code.jsonl", ({"text": text} for text in random.Random(0).sample(other, FITTED)))
    unseen = [d for d in corpora["maths"] if d.held_out]
    write(args.out / "gsm8k_held_out.jsonl", (split_answer(d) for d in unseen))


def gsm8k(path: Path) -> Iterable[dict]:
    """Question and worked answer, without the calculator annotations; every second one phrased like a prompt."""
    with gzip.open(path, "rt") as file:
        for number, line in enumerate(file):
            row = json.loads(line)
            answer = re.sub(r"<<[^>]*>>", "", row["answer"])
            text = f"Question: {row['question']}\nAnswer: {answer}" if number % 2 else f"{row['question']}\n\n{answer}"
            yield {"question": row["question"], "text": text}


def split_answer(document: Document) -> dict:
    question = document.key
    answer = document.text.removeprefix("Question: ")[len(question) :].removeprefix("\nAnswer:").strip()
    return {"question": question, "answer": answer}


def joined(texts: Iterable[str]) -> list[str]:
    """Documents long enough for a prompt and a continuation; short ones are joined."""
    documents, joined_text = [], ""
    for text in texts:
        joined_text = f"{joined_text}\n\n{text}" if joined_text else text
        if len(joined_text) >= LEAST:
            documents.append(joined_text)
            joined_text = ""
    return documents


def standard_library(pattern: str = "*.py") -> list[Path]:
    """Its modules; those in packages ("*/*.py") serve for fitting."""
    library = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in library.glob(pattern) if path.parent.name not in ("site-packages", "test"))


def code(path: Path) -> list[str]:
    """A passage from the middle of a file, from the start of a line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    start = text.find("\n", len(text) // 3) + 1
    return [text[start : start + 2400]] if len(text) - start >= LEAST else []


def code_of_python() -> Iterator[dict]:
    """Code of the standard library's packages; that of its modules is held out."""
    for path in standard_library("*/*.py"):
        yield from passages(path, path.read_text(encoding="utf-8", errors="replace"))


def headers() -> Iterator[dict]:
    """Hand-written C++ headers (ATen/ops is generated), without the licence at the top."""
    for path in sorted((package("torch") / "include").rglob("*.h")):
        if path.parent.name == "ops":
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        yield from passages(path, text[max(text.find("#pragma once"), text.find("#include"), 0) :])


def docstrings() -> Iterator[dict]:
    """Manual pages of functions: prose, signatures and examples."""
    for name in ("numpy", "scipy", "sklearn"):
        for path in sorted(package(name).rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            documented = (ast.FunctionDef, ast.ClassDef, ast.Module)
            texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
            yield from passages(path, "\n\n\n".join(text for text in texts if len(text) > 400))


def passages(path: Path, text: str) -> Iterator[dict]:
    """At most three passages per file; the held-out split hashes `file`."""
    for start in range(0, min(len(text), 3 * 2400), 2400):
        if len(text) - start >= LEAST:
            yield {"file": "/".join(path.parts[-3:]), "text": text[start : start + 2400]}


def package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"install {name} first: its files are a corpus of the study")
    return Path(spec.origin).parent


def mixed(held_out: dict[str, list[str]]) -> list[str]:
    """Documents of two halves from different domains."""
    rng, domains, texts = random.Random(0), list(held_out), []
    for _ in range(200):
        one, other = rng.sample(domains, 2)
        first, second = (rng.choice(held_out[domain])[:1600] for domain in (one, other))
        texts.append(first[: len(first) // 2].rstrip() + "\n\n" + second[len(second) // 2 :].lstrip())
    return texts


def write(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
