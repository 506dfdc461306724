"""Fields of OpenAI's, vLLM's and llama-server's requests that this server does not support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packllm.errors import shown
from packllm.serve.errors import ServeError

Unsupported = Mapping[str, tuple[str, tuple[Any, ...]]]

UNSUPPORTED: Unsupported = {
    "audio": ("the members generate text only", ()),
    "functions": ("use tools instead", ()),
    "function_call": ("use tool_choice instead", ("none",)),
    "web_search_options": ("web search is not available", ()),
    "suffix": ("the members only continue texts", ("",)),
    "use_beam_search": ("use sampling, with n for several answers", ()),
    "prompt_logprobs": ("use /v1/completions or /v1/chat/completions", ()),
    "echo": ("use /v1/completions", ()),
    "continue_final_message": ("continuing a message is not supported; put its beginning into the question", ()),
    "add_generation_prompt": ("prompts always end where the answer begins", (True,)),
    "grammar": ("use response_format with a JSON schema", ("",)),
    "json_schema": ("use response_format", ()),
    "guided_json": ("use response_format with a JSON schema", ()),
    "guided_regex": ("use response_format with a JSON schema", ()),
    "guided_choice": ("use response_format with a JSON schema that has an enum, or /v1/decisions", ()),
    "guided_grammar": ("use response_format with a JSON schema", ()),
    "structured_outputs": ("use response_format with a JSON schema", ()),
    "allowed_token_ids": ("use logit_bias", ()),
    "bad_words": ("use logit_bias", ()),
    "logits_processors": ("use logit_bias", ()),
    "stop_token_ids": ("use stop, with the text of these tokens", ()),
    "include_stop_str_in_output": ("stop strings are never part of the text", ()),
    "skip_special_tokens": ("control tokens are never part of the text", (True,)),
    "return_token_ids": ("use logprobs, which have the ids", ()),
    "return_tokens": ("use logprobs, which have the ids", ()),
    "n_probs": ("use logprobs", (0,)),
    "min_tokens": ("answers end where the members end them", (0,)),
    "ignore_eos": ("answers end where the members end them; logit_bias can delay it", ()),
    "truncate_prompt_tokens": ("prompts are never truncated", ()),
    "thinking_token_budget": ("use max_tokens", ()),
    "chat_template": ("each member has its own template; use chat_template_kwargs", ()),
    "documents": ("put them into a message", ()),
    "prompt_embeds": ("each member has its own embeddings; send text or token ids", ()),
    "n_predict": ("use max_tokens", (-1,)),
    "repeat_penalty": ("use repetition_penalty", (1,)),
    "mirostat": ("use temperature, top_p or min_p", (0,)),
    "typical_p": ("use temperature, top_p or min_p", (1,)),
    "top_n_sigma": ("use temperature, top_p or min_p", (-1, 0)),
    "xtc_probability": ("use temperature, top_p or min_p", (0,)),
    "dynatemp_range": ("use temperature, top_p or min_p", (0,)),
    "dry_multiplier": ("use repetition_penalty", (0,)),
    "lora_adapter": ("each member is a model of its own: use its name as model", ()),
    "lora": ("each member is a model of its own: use its name as model", ()),
}
"""Fields that would change the answer but are not supported. They are refused rather than ignored. Each has what to do
instead, and values that change nothing (beside false and empty lists and objects), which are accepted."""


def check_supported(fields: Mapping[str, Any], unsupported: Unsupported) -> None:
    """Raise ServeError if a field is unsupported and would change the answer."""
    for name, value in fields.items():
        instead, harmless = unsupported.get(name, ("", ()))
        if name not in unsupported or value is None or value in ([], {}) or (value is False and True not in harmless):
            continue
        if not any(value == same and isinstance(value, bool) is isinstance(same, bool) for same in harmless):
            raise ServeError(400, f"{name}={shown(value)} is not supported: {instead}", param=name)
