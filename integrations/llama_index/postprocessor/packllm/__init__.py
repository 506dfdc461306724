"""packllm for LlamaIndex: `PackRerank` reranks retrieved nodes."""

from importlib.util import find_spec

from packllm import ExtraError

if find_spec("llama_index.core") is None:
    raise ExtraError("llama_index.postprocessor.packllm", "llama-index-core", "llama-index")

from llama_index.postprocessor.packllm.base import PackRerank

__all__ = ["PackRerank"]
