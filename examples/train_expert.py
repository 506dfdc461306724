"""Train a domain expert: a LoRA adapter on the starter base, from a text or JSONL file.

    python examples/train_expert.py medicine.jsonl --out experts/medicine --group-by focus
    python examples/train_expert.py manual.txt --out experts/databases --steps 400

A JSONL row holds `question` and `answer`, or `text`. A text file is cut into documents of a few
paragraphs. Files may be gzipped. 5 % of the documents (more with --hold-out, whole groups of them with
--group-by) are held out by the hash of their key, so the split needs no file and never changes. Question-answer turns
in the base's chat template are part of the training text, so that the expert keeps answering in chat format
and ending its answers; for plain text, a turn asks about a phrase of a passage, and the answer is the
sentence with this phrase.

Needs the extra `lora`. Writes the adapter (bfloat16 safetensors) and its card to --out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

RAG_PROMPT = "Use the context to answer the question.\n\nContext:\n{context}\n\nQuestion: {question}"
DOCUMENT_CHARS = 2000
HELD_OUT = 20  # one document in twenty


@dataclass(frozen=True)
class Document:
    key: str  # keys that the held-out split hashes
    text: str
    question: str = ""
    answer: str = ""

    one_in: int = HELD_OUT

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.key.encode()).digest()
        return int.from_bytes(digest[:4], "big") % self.one_in == 0


def read_documents(path: Path, group_by: str | None = None, one_in: int = HELD_OUT) -> list[Document]:
    """The documents of a file that are not blank. OSError or ValueError if it cannot be read."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        if ".jsonl" in path.name:
            documents = [_from_line(line, at, group_by) for at, line in enumerate(file, 1) if line.strip()]
        else:
            documents = [Document(key=text, text=text) for text in _cut(file.read())]
    return [replace(document, one_in=one_in) for document in documents if document.text.strip()]


def _from_line(line: str, number: int, group_by: str | None) -> Document:
    try:
        return _from_row(json.loads(line), group_by)
    except (ValueError, KeyError, TypeError) as error:
        fields = "'text', or 'question' and 'answer'" + (f", and {group_by!r}" if group_by else "")
        raise ValueError(f"line {number} must be a JSON object with {fields} ({error!r})") from error


def _from_row(row: dict, group_by: str | None) -> Document:
    if "text" in row:
        return Document(key=str(row[group_by]) if group_by else row["text"], text=row["text"])
    question = re.sub(r" \(\w+\)| (?=\?)", "", row["question"])
    text = f"{question}\n\n{row['answer']}"
    return Document(str(row[group_by]) if group_by else text, text, question, row["answer"])


def _cut(text: str) -> Iterator[str]:
    """Documents of complete paragraphs, at most about DOCUMENT_CHARS long."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for piece in _pieces(paragraph.strip("\n")):
            if paragraphs and sum(map(len, paragraphs)) + len(piece) > DOCUMENT_CHARS:
                yield "\n\n".join(paragraphs)
                paragraphs = []
            paragraphs.append(piece)
    if paragraphs:
        yield "\n\n".join(paragraphs)


def _pieces(paragraph: str) -> Iterator[str]:
    while len(paragraph) > DOCUMENT_CHARS:
        cut = paragraph.rfind(". ", 0, DOCUMENT_CHARS) + 1 or DOCUMENT_CHARS
        yield paragraph[:cut]
        paragraph = paragraph[cut:].lstrip()
    if paragraph.strip():
        yield paragraph


def flow(text: str) -> str:
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[a-z\)][.;]) (?=[A-Z(])", flow(text)) if s]


def turn(document: Document, other: Document, rng: random.Random) -> list[dict] | None:
    """One user/assistant exchange about `document`; `other` may be a distractor in the context."""
    if document.question:
        lead = ""
        body = re.sub(r"^[^.?]{0,200}\? ", "", flow(document.answer))  # some answers repeat their question
        for sentence in sentences(body):
            if lead and len(lead) + len(sentence) > 350:
                break
            lead = f"{lead} {sentence}".strip()
        if len(lead) > 700:
            return None
        question, answer, source = document.question, lead, document.answer
        if rng.random() < 0.4:  # from memory, no context
            return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    else:
        candidates = [s for s in sentences(document.text) if 40 < len(s) < 350]
        if not candidates:
            return None
        answer = rng.choice(candidates)
        phrases = re.findall(r"\b[A-Za-z_]{4,}(?: [A-Za-z_]{3,}){1,3}\b", answer)
        if not phrases:
            return None
        question, source = f"What does the text say about {rng.choice(phrases)}?", document.text
    contexts = [_window(flow(source), answer, 900)]
    if rng.random() < 0.5:
        contexts.append(flow(other.text)[:500])
        rng.shuffle(contexts)
    prompt = RAG_PROMPT.format(context="\n\n".join(contexts), question=question)
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _window(text: str, answer: str, size: int) -> str:
    middle = max(text.find(answer[:60]), 0) + len(answer) // 2
    start = max(0, min(middle - size // 2, len(text) - size))
    start = text.find(" ", start) + 1 if start else 0
    return text[start : start + size]


def sequences(documents: list[Document], tokenizer, length: int, chat: float, seed: int) -> Iterator[list[int]]:
    """Endless packed sequences of `length` token ids: whole texts and chat turns, shuffled."""
    rng = random.Random(seed)
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>") or 0
    buffer: list[int] = []
    while True:
        for document in rng.sample(documents, len(documents)):
            messages = turn(document, rng.choice(documents), rng) if rng.random() < chat else None
            if messages:
                text = tokenizer.apply_chat_template(messages, tokenize=False)
            else:
                text = flow(document.text) if rng.random() < 0.4 else document.text
            ids = tokenizer(text, add_special_tokens=False).input_ids[: length - 1]
            buffer += [*ids, separator]
            while len(buffer) >= length:
                yield buffer[:length]
                buffer = buffer[length:]


def mean_nll(model, tokenizer, documents: list[Document], tokens: int = 256) -> float:
    """Mean NLL in nats per predicted token over the first `tokens` tokens of each document."""
    import torch

    total, count = 0.0, 0
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, return_tensors="pt").input_ids[:, :tokens]
        if ids.shape[1] < 2:
            continue
        with torch.inference_mode():
            logits = model(input_ids=ids).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="text or JSONL file, optionally .gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter and its card")
    parser.add_argument("--base", help="model folder or hub id (default: the starter base)")
    parser.add_argument("--base-name", help="what the adapter and its card call the base (default: --base)")
    parser.add_argument("--licence", default="unknown", help="licence of the data, for the card")
    parser.add_argument("--source", help="name of the data, for the card (default: the file's name)")
    parser.add_argument("--group-by", help="JSONL field whose rows are held out together")
    parser.add_argument(
        "--hold-out", type=int, default=HELD_OUT, help="hold out one document in this many; few for a small file"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=512, help="tokens a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--chat", type=float, default=0.4, help="share of documents shown as chat turns")
    parser.add_argument("--evaluate", type=int, default=60, help="held-out documents to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        documents = read_documents(args.data, args.group_by, args.hold_out)
    except (OSError, ValueError) as error:
        parser.error(f"{args.data} cannot be read: {error}")
    train = [d for d in documents if not d.held_out]
    held_out = [d for d in documents if d.held_out]
    print(f"{len(documents)} documents, {len(held_out)} held out")
    if not train or not held_out:
        parser.error(
            "there must be documents to train on and held-out ones to evaluate on; give more text, or --hold-out 3"
        )

    import torch
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.base is None:
        from packllm.starter import HUB_ID, base_model

        args.base, args.base_name = base_model(), args.base_name or HUB_ID
    sample = random.Random(args.seed).sample(held_out, min(args.evaluate, len(held_out)))
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16)
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    before = mean_nll(model, tokenizer, sample)  # B is zero at first, so this is the NLL of the base
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, args.steps // 20)

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps) + 0.02)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
    batches = sequences(train, tokenizer, args.length, args.chat, args.seed)
    model.train()
    bar = tqdm(range(args.steps), desc=args.out.name, unit="step")
    smooth = 0.0
    for step in bar:
        ids = torch.tensor([next(batches)])
        with torch.autocast("cpu" if ids.device.type == "cpu" else "cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        scheduler.step()
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}")
    model.eval()
    after = mean_nll(model, tokenizer, sample)
    print(f"held-out NLL: {before:.4f} -> {after:.4f} nats a token ({after / before - 1:+.1%})")
    _save(model, args, before, after, len(documents), len(held_out), len(sample))


def _save(model, args, before: float, after: float, total: int, held_out: int, evaluated: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model.save_pretrained(args.out)
    weights = args.out / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(weights).items()}, weights)
    config = json.loads((args.out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = (
        "HuggingFaceTB/SmolLM2-135M-Instruct" if "smol" in args.base.lower() else args.base
    )
    (args.out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (args.out / "README.md").write_text(
        f"# {args.out.name}: a LoRA expert of {config['base_model_name_or_path']}\n\n"
        f"| | |\n|---|---|\n"
        f"| data | {args.source or args.data.name}, {total:,} documents |\n"
        f"| licence of the data | {args.licence} |\n"
        f"| held out | {held_out:,} documents (one in {args.hold_out}, by hash"
        f"{' of `' + args.group_by + '`' if args.group_by else ''}) |\n"
        f"| training | {args.steps} steps of {args.length} tokens, {args.chat:.0%} of documents as chat turns |\n"
        f"| adapter | rank {args.rank} on all linear layers, learning rate {args.lr:g}, seed {args.seed}, bfloat16 |\n"
        f"| held-out NLL, base | {before:.4f} nats a token |\n"
        f"| held-out NLL, expert | {after:.4f} nats a token ({after / before - 1:+.1%}) |\n\n"
        f"NLL over the first 256 tokens of {evaluated} held-out documents. Made by `examples/train_expert.py`.\n"
    )


if __name__ == "__main__":
    main()
