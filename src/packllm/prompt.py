"""Where the first edition had these names; they live in packllm.chat.prompt."""

from packllm.chat.prompt import Encoder, check

__all__ = ["Encoder", "check"]
