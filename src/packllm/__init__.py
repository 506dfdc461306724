"""packllm: several language models answer as one.

Pack is the way in: Pack.load([...]) or Pack.starter(), then stream, generate, weigh, score or rerank.
"""

from packllm.errors import (
    ContextOverflowError,
    LoadError,
    MemberError,
    OptionError,
    PackError,
    PromptError,
    VocabularyError,
    WeightsError,
)
from packllm.member import Member
from packllm.options import OptionFields, Options
from packllm.pack import Pack
from packllm.results import Chunk, Generation, Usage
from packllm.weights import Weights

__version__ = "0.1.0"

__all__ = [
    "Chunk",
    "ContextOverflowError",
    "Generation",
    "LoadError",
    "Member",
    "MemberError",
    "OptionError",
    "OptionFields",
    "Options",
    "Pack",
    "PackError",
    "PromptError",
    "Usage",
    "VocabularyError",
    "Weights",
    "WeightsError",
]
