"""Build a transformers tokenizer from a GGUF file's metadata."""

from __future__ import annotations

import json
import re
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
"""transformers' name of each value, by the name in the file."""
_UNUSED = 5
_FILLER = re.compile(r"\[PAD\d+\]|<dummy\d+>")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(metadata: Mapping[str, Any], what: str) -> Any:
    """The tokenizer that a GGUF header describes. The result equals AutoTokenizer's for the file, in a tenth of the
    time.

    Raises:
        LoadError: the header has no vocabulary, or one that transformers cannot convert.
    """
    from transformers import PreTrainedTokenizerFast

    values = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    tokens, kind = values.get("tokens"), values.get("model")
    if not isinstance(tokens, list) or not tokens or kind in (None, "none", "no_vocab"):
        raise refused(what, "it has no vocabulary, only weights; use a file that was converted with its tokenizer")
    fillers = _fillers(tokens, values.get("token_type"))
    used = len(tokens)
    while used - 1 in fillers:
        used -= 1
    tokens = values["tokens"] = tokens[:used]
    if len(set(map(str, tokens))) < len(tokens):
        raise refused(what, "its vocabulary lists a token twice")
    with loading(f"the tokenizer of {what}"):
        parts = {own: values[name] for name, own in _PARTS.items() if name in values}
        backend, further = _converter()(str(metadata.get("general.architecture")), parts)
        if between := {tokens[i] for i in fillers if i < used}:
            backend = _without(backend, between)
        words: dict[str, Any] = {"add_bos_token": values.get("add_bos_token", kind == "llama"), **further}
        if "add_eos_token" in values:
            words["add_eos_token"] = values["add_eos_token"]
        if kind == "gemma4":  # its template writes <bos> itself
            words["add_bos_token"] = False
        for role, name in _ROLES.items():
            token_id = values.get(f"{name}_token_id")
            words[role] = tokens[token_id] if isinstance(token_id, int) and token_id < len(tokens) else None
        template = metadata.get("tokenizer.chat_template")
        return PreTrainedTokenizerFast(tokenizer_object=_Uncopied(backend), chat_template=template, **words)


def _fillers(tokens: list[Any], types: Any) -> set[int]:
    """Ids of embedding rows without a token, which converters give a name. They may follow the tokens, or lie between
    them and tokens that were added later."""
    unused = types if isinstance(types, list) and len(types) == len(tokens) else [None] * len(tokens)
    return {
        i
        for i, (token, kind) in enumerate(zip(tokens, unused, strict=True))
        if token == f"[PAD{i}]" or (kind == _UNUSED and _FILLER.fullmatch(str(token)))
    }


def _without(backend: Any, pieces: set[str]) -> Any:
    """A copy of a tokenizer without these pieces; the others keep their ids."""
    from tokenizers import Tokenizer

    data = json.loads(backend.to_str())
    if isinstance(data["model"]["vocab"], dict):  # else an id is a place in the list
        data["model"]["vocab"] = {piece: i for piece, i in data["model"]["vocab"].items() if piece not in pieces}
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in pieces]
    return Tokenizer.from_str(json.dumps(data))


def _converter() -> Any:
    """transformers' function that converts GGUF metadata into a tokenizer."""
    try:
        module = import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    except ImportError:  # older versions
        module = import_module("transformers.integrations.ggml")
    return module.convert_gguf_tokenizer


class _Uncopied:
    """A tokenizer backend that deepcopy does not copy. PreTrainedTokenizerFast copies its backend, which takes a sixth
    of a second; here nothing else uses it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __deepcopy__(self, memo: Any) -> Any:
        return self._backend
