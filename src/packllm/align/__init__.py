"""Alignment of members with different tokenizers: by the bytes of their tokens, or by the words of a text."""

from packllm.align.mined import mined
from packllm.align.vocabulary import Vocabulary

__all__ = ["Vocabulary", "mined"]
