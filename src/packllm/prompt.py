"""Old names of packllm.chat.prompt, kept for existing programs."""

from packllm.chat.prompt import Encoder, check

__all__ = ["Encoder", "check"]
