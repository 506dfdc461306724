"""Evaluation: does the pack beat its members? The papers' protocols on a user's own data, with rivals and intervals.

Each protocol (lm, choice, generate) reads rows, runs every member once on each row, and writes one record per row.
Tables and reports are made from the records. The core suffices to run them; plots and fitting need the extra `eval`,
harness.py needs `lm-eval`.
"""

from packllm_eval.rows import Document, Question, read_documents, read_questions, sample

__all__ = ["Document", "Question", "read_documents", "read_questions", "sample"]
