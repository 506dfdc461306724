"""What each token id of a tokenizer means, as bytes.

Joined, the bytes of encode(text) are the text as the tokenizer itself normalises it, and nothing else: Unicode's NFC
(GPT-NeoX, Qwen), a space put before the text (SentencePiece), "▁" read as the space it stands for, words that each
end in one space (</w>). Byte-level tokenizers without a normaliser (GPT-2, Llama-3) give the text back as it is. A byte
or word for which a tokenizer has no token is its unknown token, or is dropped (SmolLM2: six control characters).
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from packllm.errors import VocabularyError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Byte strings of a tokenizer's tokens, and its special tokens by role.

    Attributes:
        tokens: bytes that each id decodes to, by id; b"" for an id that the tokenizer does not use. Added
            and special tokens have their spelling, although they never stand for that text.
        special: id by role: "bos", "eos", "pad", "unk", "end_of_turn", where the tokenizer has one.
        control: ids of special tokens: they steer a model and are never text.
        unused: ids below len(tokens) that no token has; a model must not emit them.
        shadowed: byte-fallback pieces of bytes that other pieces spell too (<0x41> beside A): the tokenizer
            never writes them.
    """

    tokens: list[bytes]
    special: dict[str, int]
    control: frozenset[int]
    unused: frozenset[int]
    shadowed: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def text(self) -> list[int]:
        """Ids of tokens that stand for text, ascending."""
        return [i for i, token in enumerate(self.tokens) if token and i not in self.control]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: equal for tokenizers that map every id to the same byte string."""
        lengths = array("I", map(len, self.tokens))  # tell where each token ends
        return hashlib.sha256(lengths.tobytes() + b"".join(self.tokens)).hexdigest()

    def same_as(self, other: Vocabulary) -> bool:
        """Whether both map every id to the same byte string, whatever the tokenizers are called."""
        return self is other or self.fingerprint == other.fingerprint

    def first(self, size: int) -> Vocabulary:
        """The first `size` ids alone, as a model with fewer rows than its tokenizer has them."""
        if size >= len(self):
            return self
        sets = [frozenset(i for i in ids if i < size) for ids in (self.control, self.unused, self.shadowed)]
        return Vocabulary(self.tokens[:size], {r: i for r, i in self.special.items() if i < size}, *sets)

    def with_role(self, role: str, token_id: int) -> Vocabulary:
        """This vocabulary with one more special token."""
        return replace(self, special={**self.special, role: token_id}, control=self.control | {token_id})

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: none for a control token."""
        return b"" if token_id in self.control else self.tokens[token_id]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Read a transformers tokenizer (with a `tokenizers` backend) or a `tokenizers.Tokenizer`.

        Raises:
            VocabularyError: the tokenizer has no such backend.
        """
        return cls.from_json(tokenizer_json(tokenizer), tokenizer)

    @classmethod
    def from_json(cls, data: dict[str, Any], tokenizer: Any = None) -> Vocabulary:
        """As from_tokenizer, from the content of a tokenizer.json; `tokenizer` tells the roles."""
        pieces = data["model"]["vocab"]
        ids = dict(pieces) if isinstance(pieces, dict) else {piece: i for i, (piece, _) in enumerate(pieces)}
        added = {token["content"]: token for token in data["added_tokens"]}
        size = max([*ids.values(), *(token["id"] for token in added.values())], default=-1) + 1
        tokens = [b""] * size
        used = [False] * size
        to_bytes = _piece_decoder(data)
        for piece, token_id in ids.items():
            tokens[token_id] = to_bytes(piece)
            used[token_id] = True
        for content, token in added.items():
            if token["special"] or ids.get(content) != token["id"]:  # else it is one more way to find a piece
                tokens[token["id"]] = content.encode()
            used[token["id"]] = True
        special = {}
        for role in ("bos", "eos", "pad", "unk"):
            token_id = getattr(tokenizer, f"{role}_token_id", None)
            if token_id is not None:
                special[role] = int(token_id)
        control = {token["id"] for token in added.values() if token["special"]} | set(special.values())
        fallback = {i: tokens[i] for piece, i in ids.items() if _BYTE_TOKEN.fullmatch(piece) and len(tokens[i]) == 1}
        spelled = {tokens[i] for i in ids.values() if i not in fallback}
        return cls(
            tokens,
            special,
            control=frozenset(control),
            unused=frozenset(i for i in range(size) if not used[i]),
            shadowed=frozenset(i for i, byte in fallback.items() if byte in spelled),
        )


def tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """The content of a tokenizer's tokenizer.json.

    Raises:
        VocabularyError: the tokenizer has no `tokenizers` backend.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise VocabularyError(
            f"{type(tokenizer).__name__} has no `tokenizers` backend; load the fast version of this tokenizer"
        )
    return json.loads(backend.to_str())


def _piece_decoder(data: dict[str, Any]) -> Callable[[str], bytes]:
    """How a piece of this tokenizer's model spells bytes, read off its parts."""
    parts = list(_parts(data.get("decoder"))) + list(_parts(data.get("pre_tokenizer")))
    types = {part["type"] for part in parts}
    model = data["model"]
    suffix = model.get("end_of_word_suffix") or None
    if "ByteLevel" in types:
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

        def byte_level(piece: str) -> bytes:
            if suffix and piece.endswith(suffix):
                return byte_level(piece[: -len(suffix)]) + b" "
            if all(character in byte_of for character in piece):
                return bytes(byte_of[character] for character in piece)
            return piece.encode()

        return byte_level
    replaced = {part.get("pattern", {}).get("String"): part["content"] for part in parts if part["type"] == "Replace"}
    marker = next((part["replacement"] for part in parts if part["type"] == "Metaspace"), None)
    if marker is None and ("▁" in replaced or "▁" in str(data.get("normalizer"))):
        marker = "▁"
    prefix = model.get("continuing_subword_prefix") if model["type"] == "WordPiece" else None

    def plain(piece: str) -> bytes:
        if byte := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        if marker:
            piece = piece.replace(marker, " ")
        if suffix and piece.endswith(suffix):
            piece = piece[: -len(suffix)] + " "
        if prefix:
            piece = piece[len(prefix) :] if piece.startswith(prefix) else " " + piece
        return piece.encode()

    return plain


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A decoder or pre-tokenizer, flattened out of its sequences."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part.get("decoders") or part.get("pretokenizers") or ():
            yield from _parts(inner)
    else:
        yield part
