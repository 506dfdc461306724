"""packllm for LangChain: several local language models behind one `BaseLLM` and one `BaseChatModel`."""

from langchain_packllm.chat_models import ChatPackLLM
from langchain_packllm.llms import PackLLM

__all__ = ["ChatPackLLM", "PackLLM"]
