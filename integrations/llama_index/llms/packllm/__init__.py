"""packllm for LlamaIndex: `PackLLM` is a LlamaIndex LLM."""

from importlib.util import find_spec

from packllm import ExtraError

if find_spec("llama_index.core") is None:
    raise ExtraError("llama_index.llms.packllm", "llama-index-core", "llama-index")

from llama_index.llms.packllm.base import PackLLM

__all__ = ["PackLLM"]
