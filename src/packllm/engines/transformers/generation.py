"""What a model's own generation_config asks for, in this package's words."""

from __future__ import annotations

from typing import Any

_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_OFF = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_RULED_OUT = -100.0


def asks_for(model: Any) -> dict[str, Any]:
    """Options (see packllm.Options) that stand for a transformers model's own way of generating: how it samples, where
    it samples, its repetition penalty, and tokens that it suppresses, as logit_bias."""
    config = getattr(model, "generation_config", None)
    given = config.to_diff_dict() if config is not None else {}
    asked = {}
    if given.get("do_sample"):
        asked = {"temperature": 1.0, **{name: given[name] for name in _SAMPLING if given.get(name) is not None}}
    if given.get("repetition_penalty") is not None:
        asked["repetition_penalty"] = given["repetition_penalty"]
    if given.get("suppress_tokens"):
        asked["logit_bias"] = dict.fromkeys(given["suppress_tokens"], _RULED_OUT)
    return {name: value for name, value in asked.items() if value != _OFF.get(name)}
