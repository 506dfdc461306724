"""What an installed wheel with the extra `langchain` alone can do: `make wheel-check` runs this in a fresh environment.

The README's programs and commands run as they stand, on two tiny models made here instead of the starter pack; what
the extras that are absent would bring says so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
ABSENT = ("llama_index.core", "peft", "gguf", "llguidance", "datasets", "matplotlib", "sklearn", "lm_eval", "pytest")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
TEXT = "Insulin lowers the level of glucose in the blood. What does a hash index store? A quorum is a majority. "

os.environ["HF_HUB_OFFLINE"] = "1"


def tiny(folder: Path, seed: int) -> str:
    """A random Llama and a byte-level tokenizer, in a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator([TEXT], trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", chat_template=TEMPLATE)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, bos_token_id=None, **sizes)
    logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)
    logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return str(folder)


def command(*arguments: str) -> str:
    """What the installed command prints, in a process of its own."""
    program = [str(Path(sys.executable).with_name("packllm")), *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=True).stdout


def called(*arguments: str, code: int = 0) -> tuple[str, str]:
    """What it prints and what it says on stderr, in this process: libraries take seconds to import."""
    from typer.testing import CliRunner

    from packllm.cli import app

    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def refusal(act: Callable[[], object]) -> str:
    """The PackError that this raises."""
    from packllm import PackError

    try:
        act()
    except PackError as error:
        return str(error)
    raise AssertionError("not refused")


def main() -> None:
    import packllm

    assert not Path(packllm.__file__).is_relative_to(ROOT / "src"), "this is the checkout, not the wheel"
    assert not [name for name in ABSENT if find_spec(name)], "more than [langchain] is installed"
    assert command("--version") == f"packllm {packllm.__version__}\n"
    assert "torch" not in sys.modules
    from packllm import Pack, starter

    assert starter.WEIGHTS in refusal(Pack.starter)
    folders = [tiny(Path("general"), 0), tiny(Path("medicine"), 1)]
    Pack.starter = classmethod(lambda cls, **options: cls.load(folders, **options))
    for program in PROGRAMS[:2]:
        exec(compile(program, "README.md", "exec"), {})
    print("the README's programs ran")

    models = [word for folder in folders for word in ("-m", folder)]
    Path("notes").mkdir()
    Path("notes/one.md").write_text("\n\n".join([TEXT * 2] * 3), encoding="utf-8")
    assert json.loads(command("weigh", "Insulin lowers glucose.", *models, "--json"))["names"] == [
        "general",
        "medicine",
    ]
    assert "strategy em" in called("ask", "What is insulin?", *models, "-f", "notes/one.md", "--max-tokens", "4")[0]
    assert "--file notes/one.md" in called("weigh", "notes/one.md", *models, code=2)[1]
    assert "plots need matplotlib; install packllm[eval]" in called("eval", "notes", *models)[1]
    assert "Members on notes" in Path("packllm-audit/report.md").read_text(encoding="utf-8")
    assert json.loads(called("bench", *models, "--quick", "--only", "weighting")[0].splitlines()[-1])
    print("the commands ran")

    pack = Pack.load(folders)
    assert "install packllm[structured]" in refusal(lambda: pack.generate("a", json_schema={"type": "object"}))
    assert "install packllm[llama-index]" in refusal(lambda: import_module("llama_index.llms.packllm"))
    Path("model.gguf").write_bytes(b"GGUF")
    assert "install packllm[gguf]" in refusal(lambda: Pack.load("model.gguf"))
    print("what is absent says how it comes")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
