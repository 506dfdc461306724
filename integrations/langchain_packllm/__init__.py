"""packllm for LangChain: several local language models behind one `BaseLLM` and one `BaseChatModel`."""

from importlib.util import find_spec

from packllm import ExtraError

if find_spec("langchain_core") is None:
    raise ExtraError("langchain_packllm", "langchain-core", "langchain")

from langchain_packllm.chat_models import ChatPackLLM
from langchain_packllm.llms import PackLLM

__all__ = ["ChatPackLLM", "PackLLM"]
