"""A GGUF file's tokenizer, from its metadata alone, in transformers' form."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from packllm.errors import loading, refused

_PARTS = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
    "add_space_prefix": "add_prefix_space",
    **{name: name for name in ("tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id")},
}
"""transformers' name of each value, by the file's."""
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(metadata: Mapping[str, Any], what: str) -> Any:
    """The tokenizer that a header describes, as AutoTokenizer reads it from the file, in a tenth of its time.

    Raises:
        LoadError: there is no vocabulary, or one that transformers cannot build.
    """
    from transformers import PreTrainedTokenizerFast

    found = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    tokens, kind = found.get("tokens"), found.get("model")
    if not isinstance(tokens, list) or not tokens or kind in (None, "none", "no_vocab"):
        raise refused(what, "it holds no vocabulary, only weights; get a file that was converted with its tokenizer")
    used = len(tokens)
    while used and tokens[used - 1] == f"[PAD{used - 1}]":  # rows of the model without a token, as converters fill them
        used -= 1
    tokens = found["tokens"] = tokens[:used]
    if len(set(map(str, tokens))) < len(tokens):
        raise refused(what, "its vocabulary names a token twice")
    with loading(f"the tokenizer of {what}"):
        parts = {own: found[name] for name, own in _PARTS.items() if name in found}
        backend, further = _converter()(str(metadata.get("general.architecture")), parts)
        words: dict[str, Any] = {"add_bos_token": found.get("add_bos_token", kind == "llama"), **further}
        if "add_eos_token" in found:
            words["add_eos_token"] = found["add_eos_token"]
        if kind == "gemma4":  # its template writes <bos> itself
            words["add_bos_token"] = False
        for role, name in _ROLES.items():
            token_id = found.get(f"{name}_token_id")
            words[role] = tokens[token_id] if isinstance(token_id, int) and token_id < len(tokens) else None
        template = metadata.get("tokenizer.chat_template")
        return PreTrainedTokenizerFast(tokenizer_object=_Uncopied(backend), chat_template=template, **words)


def _converter() -> Any:
    """transformers' own way from such parts to a tokenizer."""
    try:
        module = import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    except ImportError:  # older ones have it here
        module = import_module("transformers.integrations.ggml")
    return module.convert_gguf_tokenizer


class _Uncopied:
    """What transformers would copy deeply, for a sixth of a second; nobody else has it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __deepcopy__(self, memo: Any) -> Any:
        return self._backend
