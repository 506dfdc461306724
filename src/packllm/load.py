"""Old name of packllm.engines.load.Loader, kept for existing programs."""

from packllm.engines.load import Loader

__all__ = ["Loader"]
