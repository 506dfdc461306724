"""packllm: several language models answer as one.

Pack is the way in: Pack.load([...]) or Pack.starter(), then stream, generate, weigh, score or rerank.
"""

from packllm.chat.formatted import Formatted
from packllm.chat.tools import CallPart, InvalidToolCall, ParsedAnswer, ToolCall, ToolStream, parse_tool_calls
from packllm.engines.transformers.member import Member
from packllm.errors import (
    ContextOverflowError,
    ExtraError,
    LoadError,
    MemberError,
    OptionError,
    PackError,
    PromptError,
    VocabularyError,
    WeightsError,
)
from packllm.options import OptionFields, Options
from packllm.pack import Pack
from packllm.results import Chunk, Generation, Usage
from packllm.weights import Weights

__version__ = "0.1.0"

__all__ = [
    "CallPart",
    "Chunk",
    "ContextOverflowError",
    "ExtraError",
    "Formatted",
    "Generation",
    "InvalidToolCall",
    "LoadError",
    "Member",
    "MemberError",
    "OptionError",
    "OptionFields",
    "Options",
    "Pack",
    "PackError",
    "ParsedAnswer",
    "PromptError",
    "ToolCall",
    "ToolStream",
    "Usage",
    "VocabularyError",
    "Weights",
    "WeightsError",
    "parse_tool_calls",
]
