"""packllm: several language models answer as one.

Start with Pack: Pack.load([...]) or Pack.starter(), then stream, generate, weigh, score or rerank.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from packllm.machine import wait_passively

if TYPE_CHECKING:
    from packllm.chat.calls import ToolStream, parse_tool_calls
    from packllm.chat.formatted import Formatted
    from packllm.chat.reasoning import ReasoningPart
    from packllm.chat.schemas import schema_of_type
    from packllm.chat.tools import CallPart, InvalidToolCall, ParsedAnswer, ToolCall
    from packllm.decode.decide import Decision
    from packllm.engines.member import Member
    from packllm.engines.memory import Estimate, MemberEstimate, estimate
    from packllm.errors import (
        AnswerTimeout,
        CancelledError,
        ContextOverflowError,
        DataError,
        ExtraError,
        LoadError,
        MemberError,
        OptionError,
        PackError,
        PromptError,
        StructureError,
        VocabularyError,
        WeightsError,
    )
    from packllm.explanation import Explanation
    from packllm.options import OptionFields, Options
    from packllm.pack import Pack
    from packllm.results import Chunk, Generation, TokenLogprob, Usage
    from packllm.weights import Weights

__version__ = "0.1.0"

wait_passively()  # must run before torch is loaded

__all__ = [
    "AnswerTimeout",
    "CallPart",
    "CancelledError",
    "Chunk",
    "ContextOverflowError",
    "DataError",
    "Decision",
    "Estimate",
    "Explanation",
    "ExtraError",
    "Formatted",
    "Generation",
    "InvalidToolCall",
    "LoadError",
    "Member",
    "MemberError",
    "MemberEstimate",
    "OptionError",
    "OptionFields",
    "Options",
    "Pack",
    "PackError",
    "ParsedAnswer",
    "PromptError",
    "ReasoningPart",
    "StructureError",
    "TokenLogprob",
    "ToolCall",
    "ToolStream",
    "Usage",
    "VocabularyError",
    "Weights",
    "WeightsError",
    "estimate",
    "parse_tool_calls",
    "schema_of_type",
]

_HOMES = {
    "chat.formatted": ("Formatted",),
    "chat.calls": ("ToolStream", "parse_tool_calls"),
    "chat.reasoning": ("ReasoningPart",),
    "chat.schemas": ("schema_of_type",),
    "chat.tools": ("CallPart", "InvalidToolCall", "ParsedAnswer", "ToolCall"),
    "decode.decide": ("Decision",),
    "engines.member": ("Member",),
    "engines.memory": ("Estimate", "MemberEstimate", "estimate"),
    "explanation": ("Explanation",),
    "options": ("OptionFields", "Options"),
    "pack": ("Pack",),
    "results": ("Chunk", "Generation", "TokenLogprob", "Usage"),
    "weights": ("Weights",),
}
"""The modules of the names above; all other names are in errors."""


def __getattr__(name: str) -> Any:
    """Import a public name or a module of this package on first use (PEP 562). torch and transformers take seconds to
    load, which `import packllm` and the command line's --help should not."""
    if name in __all__:
        home = next((home for home, names in _HOMES.items() if name in names), "errors")
        value = getattr(import_module(f"{__name__}.{home}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
