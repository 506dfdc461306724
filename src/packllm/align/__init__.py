"""Where members with different tokenizers meet: byte strings of tokens, and common words of a text."""

from packllm.align.mined import mined
from packllm.align.vocabulary import Vocabulary

__all__ = ["Vocabulary", "mined"]
