"""Where the first edition had this name; it lives in packllm.engines.load."""

from packllm.engines.load import Loader

__all__ = ["Loader"]
