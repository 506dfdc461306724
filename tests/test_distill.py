"""Distillation: what the pack says of texts, taught to one member."""

from __future__ import annotations

import pytest
import torch

from packllm import Pack
from packllm_eval import distill as distilling
from packllm_eval.distill import Training, distill
from packllm_eval.rows import Document

TEXTS = [
    "The court shall order relief under chapter 7 unless the debtor objects within 30 days of the notice.",
    "A query planner chooses an index scan or a sequential scan from statistics of the table.",
    "Diabetes is a disease in which the blood glucose, or blood sugar, level is too high. Insulin helps glucose.",
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris.",
    "Once upon a time there was a little girl who lived in a small house near the forest with her old dog.",
]


def documents(texts=TEXTS, corpus="c"):
    return [Document(f"{corpus}{at:04x}", corpus, text) for at, text in enumerate(texts)]


def test_x(make_member, tmp_path):
    pack = Pack([make_member("llama", 0, name="a"), make_member("llama", 1, name="b")])
    result = distill(pack, "a", documents()[:4], documents()[4:], tmp_path / "o", Training(epochs=3), length=64)
    print(result)
