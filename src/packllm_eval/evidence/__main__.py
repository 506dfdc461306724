"""python -m packllm_eval.evidence read | answer | passages | tables: see the package."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("read", "answer", "passages", "tables"))
    parser.add_argument("--data", type=Path, required=True, help="folder of texts.jsonl.gz (evidence_texts.py)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the arrays and answers")
    parser.add_argument("--model", action="append", help="a member, as for packllm ask; default: the starter pack")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of the members' weights")
    parser.add_argument("--limit", type=int, help="first rows of each corpus and use only")
    parser.add_argument("--set", action="append", choices=("rag", "lm", "choice"), help="read these only")
    parser.add_argument("--joined", action="store_true", help="passages: two questions of a corpus in one message")
    parser.add_argument("--count", type=int, help="answer, passages: the first so many questions of each corpus only")
    parser.add_argument("--batch", type=int, default=100, help="prompts that are answered together")
    args = parser.parse_args()
    if args.step == "tables":
        from packllm_eval.evidence import tables

        print(tables.told(args.data, args.out, args.limit))
        return
    from packllm import Pack, starter
    from packllm_eval.evidence import answers, passages, reading

    members = Pack.load(args.model or starter.specs(), dtype=args.dtype, device_map=None).models
    if args.step == "read":
        reading.read(members, args.data, args.out, args.device, args.limit, args.set or reading.SETS)
    elif args.step == "passages":
        passages.read(
            members,
            args.data,
            args.out,
            args.device,
            args.limit,
            args.count,
            args.batch,
            "joined" if args.joined else "rag",
        )
    else:
        answers.answer(members, args.data, args.out, args.device, args.limit, args.batch, args.count)


if __name__ == "__main__":
    main()
