"""The texts of the evidence on weights that learn, none of which an expert was trained on, in one file.

    python examples/held_out.py --shared ../shared --out study
    python examples/evidence_texts.py --shared ../shared --study study --out study/evidence

- lm: the documents of `study.py corpora`.
- rag: questions with one right passage among two wrong ones, and gold answers, 100 a domain and 30 others to calibrate
  on. Medicine: MedQuAD's questions. Law and databases: a passage's heading, asked for in one of several wordings; the
  gold answer is how the passage begins. Wrong passages: the nearest of all held-out ones in tf-idf, not of the same
  document.
- choice: 1,000 multiple-choice questions and 50 others, evenly of the tasks.

Each line is {"id", "set", "corpus", "use": test or calibrate, "prompt": text or messages, "texts": [what may follow]};
a question also has "answer", the index of the right text. `packllm_eval.evidence` reads them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from study import CORPORA as DOCUMENTS
from train_expert import Document, flow, read_documents, sentences

from packllm.chat.messages import with_context
from packllm_eval import rows

SOURCES = {
    "medicine": ("corpora/medicine_medquad.jsonl.gz", "focus"),
    "law": ("corpora/law_uscode.txt.gz", None),
    "databases": ("corpora/databases_postgresql15.txt.gz", None),
}
HEADINGS = {
    "law": re.compile(r"(?:Sec\.|Rule|Section) [\dA-Za-z.-]+?\.? +(?P<title>[A-Z].{3,110}?)\.?"),
    "databases": re.compile(r"[A-Z0-9]{1,3}(?:\.\d+)+\. (?P<title>\S.{2,80})"),
}
WORDINGS = {
    "law": (
        'What does the law provide under "{title}" about {phrase}?',
        'Under "{title}", what is the rule on {phrase}?',
        "What should I know about {phrase} ({title})?",
    ),
    "databases": (
        'In PostgreSQL, what does the manual say about {phrase} (see "{title}")?',
        'How does PostgreSQL deal with {phrase}? The chapter is "{title}".',
        "Explain {phrase} in PostgreSQL ({title}).",
    ),
}
TASKS = ("arc_challenge", "arc_easy", "medqa_usmle", "mmlu_health", "mmlu_stem", "openbookqa", "piqa")
TEST, CALIBRATE = 100, 30
PASSAGE = 800  # characters
ANSWER = 350
NEAR = 15  # documents of some 2,000 characters after a heading that it still stands over


@dataclass
class Item:
    corpus: str
    source: int  # the document, by number
    question: str
    answer: str
    passage: str
    heading: str = ""  # what the passage begins with, before its text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with corpora/ and eval/")
    parser.add_argument("--study", type=Path, required=True, help="what held_out.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = [*language(args.study), *rag(args.shared), *choices(args.shared)]
    with gzip.open(args.out / "texts.jsonl.gz", "wt", encoding="utf-8") as file:
        for row in found:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(json.dumps({name: sum(row["set"] == name for row in found) for name in ("lm", "rag", "choice")}))


def row(id_: str, kind: str, corpus: str, use: str, prompt: object, texts: list[str], **more: object) -> dict:
    return {"id": id_, "set": kind, "corpus": corpus, "use": use, "prompt": prompt, "texts": texts, **more}


def language(study: Path) -> list[dict]:
    found = [document for name in DOCUMENTS for document in rows.read_documents(study / f"{name}.jsonl")]
    return [row(d.id, "lm", d.corpus, "test", d.text[:3000], []) for d in rows.sample(found, None, 0, 200)]


def rag(shared: Path) -> list[dict]:
    items, passages = [], []
    for corpus, (path, group) in SOURCES.items():
        documents = read_documents(shared / path, group)
        made = list(asked(documents) if corpus == "medicine" else headed(documents, corpus))
        passages += [(corpus, item.source, item.passage) for item in made]
        items += random.Random(f"rag {corpus}").sample(made, TEST + CALIBRATE)
    wrong = retrieved(
        [item.question for item in items],
        [(corpus, source) for corpus, source, _ in passages],
        [text for _, _, text in passages],
        [(item.corpus, item.source) for item in items],
    )
    found = []
    for at, (item, others) in enumerate(zip(items, wrong, strict=True)):
        shown = [item.passage, *others]
        random.Random(f"order {at}").shuffle(shown)
        number = at % (TEST + CALIBRATE)
        use = "test" if number < TEST else "calibrate"
        prompt = [{"role": "user", "content": with_context(item.question, shown)}]
        found.append(row(f"rag-{item.corpus}-{number}", "rag", item.corpus, use, prompt, [item.answer]))
    return found


def asked(documents: list[Document]) -> Iterator[Item]:
    """MedQuAD: one question of each document's subject, each subject once."""
    seen = set()
    for number, document in enumerate(documents):
        if not document.held_out or not document.question or document.key in seen:
            continue
        body = re.sub(r"^[^.?]{0,200}\? ", "", flow(document.answer))  # some answers repeat their question
        answer = lead(body)
        listed = "Human Phenotype Ontology" in answer  # one sentence for hundreds of diseases, and a table
        if answer and len(body) > 300 and not listed:
            seen.add(document.key)
            yield Item("medicine", number, document.question, answer, body[:PASSAGE])


def headed(documents: list[Document], corpus: str) -> Iterator[Item]:
    """A passage of each held-out document, asked for by the last heading before it and a phrase of its beginning."""
    title, told, used = "", 0, set()
    for number, document in enumerate(documents):
        for paragraph in re.split(r"\n\s*\n", document.text):
            text = flow(paragraph)
            if match := HEADINGS[corpus].fullmatch(text):
                title, told = match["title"], number
                continue
            answer = lead(re.sub(r"^\(\w+\) ", "", text))
            phrases = re.findall(r"\b[A-Za-z_]{4,}(?: [A-Za-z_]{3,}){1,2}\b", answer)
            prose = len(re.findall(r"[a-z]{3,}", answer)) > 0.6 * len(answer.split()) and not re.search("[{}=]", answer)
            near = title and number - told < NEAR
            if not (document.held_out and near and prose and phrases) or number in used or len(text) < 150:
                continue
            used.add(number)
            whole = flow(document.text)
            start = max(0, whole.find(answer[:60]) - random.Random(f"{corpus} {number}").randrange(200))
            start = whole.find(" ", start) + 1 if start else 0
            rng = random.Random(f"question {corpus} {number}")
            question = rng.choice(WORDINGS[corpus]).format(title=title, phrase=max(phrases[:3], key=len))
            yield Item(corpus, number, question, answer, f"{title}. {whole[start : start + PASSAGE]}", title)


def lead(text: str) -> str:
    """The first sentences, up to ANSWER characters; nothing where there is none of a fair length."""
    found = ""
    for sentence in sentences(text):
        if found and len(found) + len(sentence) > ANSWER:
            break
        found = f"{found} {sentence}".strip()
    return found if 40 <= len(found) <= 2 * ANSWER else ""


def retrieved(
    questions: list[str], sources: list[tuple[str, int]], passages: list[str], own: list[tuple[str, int]]
) -> list[list[str]]:
    """The two passages nearest to each question that are not of its own document."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    index = vectors.fit_transform(passages)
    near = (vectors.transform(questions) @ index.T).toarray()
    found = []
    for scores, source in zip(near, own, strict=True):
        order = sorted(range(len(passages)), key=lambda at: (-scores[at], at))
        found.append([passages[at] for at in order if sources[at] != source][:2])
    return found


def choices(shared: Path) -> list[dict]:
    found = []
    for use, count, start in (("test", 1000, 0), ("calibrate", 50, 1)):
        for number in range(count):
            task = TASKS[number % len(TASKS)]
            pool = questions(shared, task)
            at = number // len(TASKS)
            q = pool[at] if not start else pool[-1 - at]
            texts = [f" {choice}" for choice in q.choices]
            prompt = f"Question: {q.question}\nAnswer:"
            found.append(row(q.id, "choice", task, use, prompt, texts, answer=q.answer))
    return found


def questions(shared: Path, task: str, _known: dict[str, list] = {}) -> list[rows.Question]:  # noqa: B006
    """All of a task, in an order drawn once."""
    if task not in _known:
        _known[task] = rows.read_questions(shared / "eval" / f"{task}.jsonl.gz")
        _known[task] = list({q.id: q for q in _known[task]}.values())
        random.Random(task).shuffle(_known[task])
    return _known[task]


if __name__ == "__main__":
    main()
