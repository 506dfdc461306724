"""packllm for LangChain: several local language models behind one `BaseLLM` and one `BaseChatModel`."""

from packllm.errors import ExtraError

try:
    import langchain_core  # noqa: F401
except ModuleNotFoundError:
    raise ExtraError("langchain_packllm", "langchain-core", "langchain") from None

from langchain_packllm.chat_models import ChatPackLLM
from langchain_packllm.llms import PackLLM

__all__ = ["ChatPackLLM", "PackLLM"]
