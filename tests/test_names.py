"""Public names that callers rely on: they are there, and take the arguments that they are documented to take."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

OPTIONS = (
    "max_tokens temperature top_p top_k seed stop weighting pool min_weight tau alpha beta fitted unit decoding "
    "draft_tokens scoring align chat_template chat_template_kwargs score_on timeout on_member_error tools tool_choice "
    "json_schema batch_size max_cache_mb prefix_cache_mb"
)

CALLS = {
    "packllm.Pack.load": "models weighting decoding dtype device_map trust_remote_code model_kwargs",
    "packllm.Pack.starter": "dtype device_map",
    "packllm.Pack.weigh": f"prompt cancel {OPTIONS}",
    "packllm.Pack.stream": f"prompt cancel {OPTIONS}",
    "packllm.Pack.stream_batch": f"prompts cancel {OPTIONS}",
    "packllm.Pack.generate": f"prompt cancel {OPTIONS}",
    "packllm.Pack.generate_batch": f"prompts cancel {OPTIONS}",
    "packllm.Pack.astream": f"prompt cancel {OPTIONS}",
    "packllm.Pack.astream_batch": f"prompts cancel {OPTIONS}",
    "packllm.Pack.agenerate": f"prompt cancel {OPTIONS}",
    "packllm.Pack.score": f"prompt continuations cancel {OPTIONS}",
    "packllm.Pack.rerank": f"prompt candidates cancel {OPTIONS}",
    "packllm.Pack.relevance": f"question passages cancel {OPTIONS}",
    "packllm.Pack.arelevance": f"question passages cancel {OPTIONS}",
    "packllm.Explanation": "names weights unit messages passages tokens",
    "packllm.Explanation.html": "",
    "packllm.Explanation.plot": "",
    "packllm.Explanation.as_dict": "",
    "packllm.Pack.count_tokens": f"prompt {OPTIONS}",
    "packllm.Pack.tokenize": "text",
    "packllm.Pack.check": OPTIONS,
    "packllm.Pack.close": "",
    "packllm.Member": "model tokenizer name encoder engine adapter",
    "packllm.Options": OPTIONS,
    "packllm.Chunk": "text weights finish_reason usage timings reasoning",
    "packllm.Generation": "text weights finish_reason usage timings reasoning",
    "packllm.Weights": "values names pool nll unit strategy",
    "packllm.Weights.as_dict": "",
    "packllm.weights.em": "logprobs alpha",
    "packllm.weights.solve": "name logits targets tau alpha beta",
    "packllm.align.mined": "",
    "packllm.engines.base.Engine.open": "adapter",
    "packllm.engines.base.Engine.read": "reads",
    "packllm.engines.base.Sequence.crop": "length",
    "packllm.engines.base.Sequence.fork": "",
    "packllm.engines.base.Sequence.close": "",
    "packllm.engines.base.Read": "sequence ids want",
    "langchain_packllm.PackLLM": f"models pack {OPTIONS}",
    "langchain_packllm.ChatPackLLM": f"models pack {OPTIONS}",
    "llama_index.llms.packllm.PackLLM": f"models pack {OPTIONS}",
}
"""Dotted name: names of arguments. What takes any keyword (**options) takes what Options has."""

DICTS = {
    "packllm.weights.WEIGHTINGS": "em uniform top1 sim opt exhaustive exact map dexperts dexperts-opt cbtm router",
}

ERRORS = {
    "OptionError": ValueError, "PromptError": ValueError, "ContextOverflowError": ValueError, "LoadError": Exception,
    "MemberError": RuntimeError, "CancelledError": Exception, "AnswerTimeout": TimeoutError, "WeightsError": ValueError,
    "VocabularyError": Exception, "StructureError": Exception, "ExtraError": ImportError, "DataError": ValueError,
}  # fmt: skip


def found(name: str) -> Any:
    """What a dotted name names."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"{name} is not there")


@pytest.mark.parametrize("name", CALLS)
def test_what_is_called(name: str) -> None:
    if name.startswith("langchain_packllm"):
        pytest.importorskip("langchain_core")
    if name.startswith("llama_index"):
        pytest.importorskip("llama_index.core")
    value = found(name)
    if inspect.ismodule(value):
        return
    inits = [one.__init__ for one in value.__mro__[:-1]] if isinstance(value, type) else [value]
    parameters = {name: each for init in inits for name, each in inspect.signature(init).parameters.items()}
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = {*parameters, *(found("packllm.Options").model_fields if anything else ())}
    assert set(CALLS[name].split()) <= known
    if name.startswith("packllm.Pack.a"):
        assert inspect.isasyncgenfunction(value) or inspect.iscoroutinefunction(value)
    assert value.__doc__ or name.startswith("packllm.engines.base.Sequence")


@pytest.mark.parametrize("name", DICTS)
def test_what_a_registry_holds(name: str) -> None:
    assert set(DICTS[name].split()) <= found(name).keys()


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    error = found(f"packllm.{name}")
    assert issubclass(error, found("packllm.PackError"))
    assert issubclass(error, ERRORS[name])


def test_all_that_is_exported_is_there() -> None:
    package = importlib.import_module("packllm")
    assert all(getattr(package, name) for name in package.__all__)
