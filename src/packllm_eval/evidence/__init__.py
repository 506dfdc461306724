"""The evidence on weights that learn: what every member gives each token is read once and kept as arrays; all methods
are then compared on the arrays.

    python examples/evidence_texts.py --shared ../shared --study study --out study/evidence
    python -m packllm_eval.evidence read --data study/evidence --out study/evidence --device cuda
    python -m packllm_eval.evidence answer --data study/evidence --out study/evidence --device cuda
    python -m packllm_eval.evidence tables --data study/evidence --out study/evidence > docs/results/evidence.md

A run that was stopped goes on from its arrays. Members run as plain transformers models in padded batches, not by the
engine: that is what accelerators are fast at, and it checks the engine's numbers from outside.
"""
