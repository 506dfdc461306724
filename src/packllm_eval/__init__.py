"""Does the pack beat its members? Protocols of the papers on a user's own data, with rivals, intervals and reports.

Each protocol (lm, choice, generate) reads rows, runs every member once on each, and files a record a row; tables
and reports are made of the records. Needs nothing but the core; plots and fitting need the extra `eval`, harness.py
`lm-eval`.
"""

from packllm_eval.rows import Document, Question, read_documents, read_questions, sample

__all__ = ["Document", "Question", "read_documents", "read_questions", "sample"]
