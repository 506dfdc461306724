"""Put passages in order by what explains the question: the pack, each member alone, MiniLM's cosine, and tf-idf.

    python examples/rerank.py --shared ../shared --out study/rerank

Questions are of three corpora, of documents that no expert was trained on: MedQuAD's, and those that evidence_texts.py
asks of law and of PostgreSQL's manual, whose passages come without their heading. For each question: its own passage
and the nine nearest of its corpus in tf-idf, all cut to their first words. What each member gives every question after
every passage is read once, by plain transformers models as the evidence is, and kept in --out, where a run that was
stopped goes on. `Pack.relevance` rates a few of the questions, too: for its time, and to see that it says the same.

Prints recall@1 and @5 with 95 % intervals over questions, the difference to MiniLM, and seconds; then a line of JSON.
`--part dev` asks others, 12 a corpus, to choose on.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from embedding import MiniLM
from evidence_texts import SOURCES, headed
from sklearn.feature_extraction.text import TfidfVectorizer
from train_expert import flow, read_documents

from packllm import Pack, starter
from packllm.chat.messages import check
from packllm.decode.relevance import asking, with_cosine
from packllm_eval.evidence.methods import dropped, em, likelihood
from packllm_eval.evidence.reading import Alone
from packllm_eval.statistics import interval, paired

WORDS = 60  # of a passage
CANDIDATES = 10
TEST, DEV = 67, 12  # questions a corpus


@dataclass
class Asked:
    corpus: str
    question: str
    passages: list[str]  # its own first
    nearness: list[float]  # in tf-idf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with corpora/")
    parser.add_argument("--out", type=Path, required=True, help="folder of what members said")
    parser.add_argument("--part", choices=("test", "dev"), default="test")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--timed", type=int, default=1, help="questions a corpus that Pack.relevance rates, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    items = list(asked(args.shared, args.part))
    names = [spec.partition("=")[0] for spec in starter.specs()]
    said = {name: read(name, items, args.out / f"{args.part}-{name}.jsonl", args.dtype) for name in names}
    minilm = MiniLM()

    def cosine(question: str, passages: Sequence[str]) -> list[float]:
        first, *others = torch.tensor(minilm.embed([question, *passages]))
        return [float(first @ other) for other in others]

    embedded = [minilm.embed([item.question, *item.passages]) for item in items]
    ratings = {**by_members(items, said), "tf-idf cosine": [item.nearness for item in items]}
    ratings["MiniLM cosine"] = [(torch.tensor(own) @ torch.tensor(first)).tolist() for first, *own in embedded]
    for name in ("pack", *names):
        both = zip(ratings[name], embedded, strict=True)
        ratings[f"{name} + MiniLM cosine"] = [with_cosine(rated, first, own) for rated, (first, *own) in both]
    some = [item for corpus in SOURCES for item in items if item.corpus == corpus][:: len(items) // len(SOURCES)]
    some = some[: len(SOURCES)] * bool(args.timed)
    seconds = timed(some, names, ratings["pack"], items, cosine, args.dtype) if some else {}
    show(ratings, items, seconds)


def asked(shared: Path, part: str) -> Iterator[Asked]:
    for corpus, (path, group) in SOURCES.items():
        documents = read_documents(shared / path, group)
        if corpus == "medicine":
            told = [d for d in documents if d.held_out and d.question and len(d.answer) > 300]
            # Some answers repeat their question.
            pairs = [(d.question, cut(re.sub(r"^[^.?]{0,200}\? ", "", flow(d.answer)))) for d in told]
        else:
            found = headed(documents, corpus)
            pairs = [(item.question, cut(item.passage.removeprefix(item.heading + ". "))) for item in found]
        pairs = [(question, passage) for passage, question in {p: q for q, p in pairs}.items()]
        passages = [passage for _, passage in pairs]
        vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english")
        index = vectors.fit_transform(passages)
        draw = random.Random(f"rerank {corpus}").sample(range(len(pairs)), TEST + DEV)
        for own in draw[:TEST] if part == "test" else draw[TEST:]:
            near = (vectors.transform([pairs[own][0]]) @ index.T).toarray()[0]
            others = sorted(set(range(len(passages))) - {own}, key=lambda at: (-near[at], at))
            chosen = [own, *others[: CANDIDATES - 1]]
            yield Asked(corpus, pairs[own][0], [passages[at] for at in chosen], near[chosen].tolist())


def cut(text: str) -> str:
    return " ".join(text.split()[:WORDS])


def read(name: str, items: Sequence[Asked], path: Path, dtype: str) -> dict[tuple[str, str], tuple[list, list]]:
    """{(passage, question): log p of the tokens of (the passage, the question after it)} of one member.

    The instruction is read once, each passage once for all the questions that it may answer."""
    asks: dict[str, list[str]] = {}
    for item in items:
        for passage in item.passages:
            asks.setdefault(passage, []).append(item.question)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    left = {passage: questions for passage, questions in asks.items() if passage not in {one["p"] for one in lines}}
    if left:
        spec = next(spec for spec in starter.specs() if spec.partition("=")[0] == name)
        alone = Alone(Pack.load([spec], dtype=dtype, device_map=None).models[0], "cpu")
        with open(path, "a", encoding="utf-8") as file:
            for at, line in enumerate(given(alone, left)):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                lines.append(line)
                if at % 50 == 0:
                    print(f"{name}: {at} of {len(left)} passages", file=sys.stderr, flush=True)
    return {
        (one["p"], q): (one["pl"], rated) for one in lines for q, rated in zip(asks[one["p"]], one["q"], strict=True)
    }


def given(alone: Alone, asks: dict[str, list[str]]) -> Iterator[dict]:
    encoder, body = alone.member.encoder, alone.model.model
    told = {passage: encoder.encode(check(asking(passage, chat=True), False)) for passage in asks}
    rows = [encoded.ids for encoded in told.values()]
    shared = next(at for at, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)

    def scores(hidden: torch.Tensor, ids: Sequence[int]) -> list[float]:
        logits = alone.real(alone.model.lm_head(hidden))
        found = logits.gather(-1, torch.tensor(ids)[:, None])[:, 0] - logits.logsumexp(-1)
        return [round(value, 4) for value in found.tolist()]

    with torch.inference_mode():
        first = body(input_ids=torch.tensor([rows[0][:shared]]), use_cache=True)
        beginning = first.past_key_values
        for passage, questions in asks.items():
            encoded = told[passage]
            ids = torch.tensor([encoded.ids[shared:]])
            read = body(input_ids=ids, past_key_values=copy.deepcopy(beginning), use_cache=True)
            hidden = torch.cat([first.last_hidden_state[0], read.last_hidden_state[0]])
            before = scores(hidden[[at - 1 for at in encoded.positions]], [encoded.ids[at] for at in encoded.positions])
            asked = [encoder.continuation(question) for question in questions]
            ids = torch.zeros(len(asked), max(map(len, asked)), dtype=torch.long)
            for at, row in enumerate(asked):
                ids[at, : len(row)] = torch.tensor(row)
            cache = read.past_key_values
            cache.batch_repeat_interleave(len(asked))
            after = body(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
            rated = [scores(torch.cat([hidden[-1:], after[at, : len(row) - 1]]), row) for at, row in enumerate(asked)]
            yield {"p": passage, "pl": before, "q": rated}


def by_members(items: Sequence[Asked], said: dict[str, dict]) -> dict[str, list[list[float]]]:
    """Ratings of each member, and of the pack: under `em` of each passage, as Pack.relevance, and under one set of
    weights for all passages of a question."""
    found: dict[str, list[list[float]]] = {name: [] for name in ("pack", ALL, OWN, *said)}
    for item in items:
        both = [[one[p, item.question] for one in said.values()] for p in item.passages]
        prompts = [np.array([told for told, _ in row]) for row in both]
        questions = [np.array([rated for _, rated in row]) for row in both]
        each = [dropped(em(prompt)) for prompt in prompts]
        found["pack"].append([float(likelihood(w, q).sum()) for w, q in zip(each, questions, strict=True)])
        for label, seen in ((ALL, prompts), (OWN, questions)):
            weights = dropped(em(np.concatenate(seen, axis=1)))
            found[label].append([float(likelihood(weights, q).sum()) for q in questions])
        for k, name in enumerate(said):
            found[name].append([float(q[k].sum()) for q in questions])
    return found


ALL = "pack, weights of all passages together"
OWN = "pack, weights of the question after all passages"


def timed(
    some: Sequence[Asked],
    names: Sequence[str],
    rated: Sequence[Sequence[float]],
    items: Sequence[Asked],
    cosine: Callable[[str, Sequence[str]], list[float]],
    dtype: str,
) -> dict[str, float]:
    """Seconds a question with nothing kept from before; says how far Pack.relevance is from the ratings here."""
    pack = Pack.load(starter.specs(), dtype=dtype, prefix_cache_mb=0)
    total = dict.fromkeys(["pack", *names, "MiniLM cosine"], 0.0)
    for item in some:
        for name in total:
            start = time.perf_counter()
            if name == "MiniLM cosine":
                cosine(item.question, item.passages)
            else:
                options = {} if name == "pack" else {"weighting": {name: 1.0}}
                found = pack.relevance(item.question, item.passages, **options)
                if name == "pack":
                    off = np.abs(np.subtract(found, rated[items.index(item)])).max()
                    print(f"{item.corpus}: Pack.relevance within {off:.3f} nats of the ratings here", file=sys.stderr)
            total[name] += time.perf_counter() - start
    return {name: value / len(some) for name, value in total.items()}


def show(ratings: dict[str, Sequence], items: Sequence[Asked], seconds: dict[str, float]) -> None:
    # Its own passage is the first; ties are lost.
    ranks = {n: np.array([1 + sum(x >= own for x in others) for own, *others in found]) for n, found in ratings.items()}
    rows = {}
    headings = ["", *(f"recall@1, {corpus}" for corpus in SOURCES), "recall@1", "against MiniLM", "recall@5", "seconds"]
    print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for name in sorted(ranks, key=lambda name: -(ranks[name] <= 1).mean()):
        first, five = (ranks[name] <= 1).astype(float), (ranks[name] <= 5).astype(float)
        own = [first[[item.corpus == corpus for item in items]].mean() for corpus in SOURCES]
        one, many = interval(first.tolist()), interval(five.tolist())
        against = paired(first, (ranks["MiniLM cosine"] <= 1).astype(float))
        gap, took = against.difference, f"{seconds[name]:.1f}" if name in seconds else ""
        cells = [name, *(f"{value:.3f}" for value in own), f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"]
        cells += [f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]", f"{many.value:.3f}", took]
        print("| " + " | ".join(cells) + " |")
        rows[name] = {"recall@1": one.as_dict(), "recall@5": many.as_dict(), "against MiniLM": against.as_dict()}
        rows[name] |= {"seconds": seconds.get(name)}
    print(json.dumps({"questions": len(items), "candidates": CANDIDATES, "words": WORDS, "rows": rows}))


if __name__ == "__main__":
    main()
