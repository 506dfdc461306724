"""packllm for LangChain: several local language models as one `BaseLLM` and one `BaseChatModel`, a document reranker,
and, if langchain-core has it, one `BaseDecisionModel`."""

from importlib.util import find_spec
from typing import Any

from packllm import ExtraError

if find_spec("langchain_core") is None:
    raise ExtraError("langchain_packllm", "langchain-core", "langchain")

from langchain_packllm.chat_models import ChatPackLLM
from langchain_packllm.llms import PackLLM
from langchain_packllm.reranker import PackReranker

__all__ = ["ChatPackLLM", "PackLLM", "PackReranker"]


def __getattr__(name: str) -> Any:
    if name != "PackDecisions":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("langchain_core.decisions") is None:
        raise ExtraError("PackDecisions", "langchain-core>=1.8", "langchain")
    from langchain_packllm.decisions import PackDecisions

    return PackDecisions
