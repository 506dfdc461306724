"""packllm for LangChain: several local language models behind one `BaseLLM`."""

from langchain_packllm.llms import PackLLM

__all__ = ["PackLLM"]
