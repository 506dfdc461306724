"""packllm for LlamaIndex: `PackLLM` answers wherever LlamaIndex takes an LLM."""

from packllm.errors import ExtraError

try:
    import llama_index.core  # noqa: F401
except ModuleNotFoundError:
    raise ExtraError("llama_index.llms.packllm", "llama-index-core", "llama-index") from None

from llama_index.llms.packllm.base import PackLLM

__all__ = ["PackLLM"]
