"""The settings of a model's generation_config as options of this package."""

from __future__ import annotations

from typing import Any

_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_OFF = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_RULED_OUT = -100.0


def asks_for(model: Any) -> dict[str, Any]:
    """Options (see packllm.Options) for a transformers model's own generation settings: sampling, if do_sample is set,
    repetition penalty, and suppressed tokens, as logit_bias."""
    config = getattr(model, "generation_config", None)
    settings = config.to_diff_dict() if config is not None else {}
    options = {}
    if settings.get("do_sample"):
        options = {"temperature": 1.0, **{name: settings[name] for name in _SAMPLING if settings.get(name) is not None}}
    if settings.get("repetition_penalty") is not None:
        options["repetition_penalty"] = settings["repetition_penalty"]
    if settings.get("suppress_tokens"):
        options["logit_bias"] = dict.fromkeys(settings["suppress_tokens"], _RULED_OUT)
    return {name: value for name, value in options.items() if value != _OFF.get(name)}
