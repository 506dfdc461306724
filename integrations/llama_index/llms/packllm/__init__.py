"""packllm for LlamaIndex: `PackLLM` answers wherever LlamaIndex takes an LLM."""

from llama_index.llms.packllm.base import PackLLM

__all__ = ["PackLLM"]
