"""Evidence on adaptive and calibrated weights: every member's log-probabilities are computed once and stored as arrays;
then all methods are compared on the arrays.

    python examples/evidence_texts.py --shared ../shared --study study --out study/evidence
    python -m packllm_eval.evidence read --data study/evidence --out study/evidence --device cuda
    python -m packllm_eval.evidence answer --data study/evidence --out study/evidence --device cuda
    python -m packllm_eval.evidence tables --data study/evidence --out study/evidence > docs/results/evidence.md

An interrupted run is continued. Members run as plain transformers models in padded batches instead of by the engine:
this is fast on accelerators, and checks the engine's numbers independently.
"""
