"""The folder for results that are computed once: converted models, token mappings."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$PACKLLM_CACHE, or ~/.cache/packllm. Everything in it can be computed again."""
    return Path(os.environ.get("PACKLLM_CACHE") or Path.home() / ".cache" / "packllm")
