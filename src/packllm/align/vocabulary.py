"""The bytes that each token id of a tokenizer stands for.

The bytes of encode(text), joined, are the text as the tokenizer itself normalises it: in Unicode's NFC (GPT-NeoX,
Qwen), with a space before the text (SentencePiece), with "▁" for a space, or with one space after each word (</w>).
Byte-level tokenizers without a normaliser (GPT-2, Llama-3) reproduce the text exactly. A byte or word for which a
tokenizer has no token becomes its unknown token, or is dropped (SmolLM2: six control characters).
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from packllm.errors import VocabularyError

_HOLES = 8
"""How many ids may be unused for each id that is used."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Byte strings of a tokenizer's tokens, and its special tokens by role.

    Attributes:
        tokens: the bytes that each id decodes to, by id; b"" for an id that the tokenizer does not use. Added
            and special tokens have their spelling here, although they never stand for that text.
        special: id by role ("bos", "eos", "pad", "unk", "end_of_turn"), for the roles that the tokenizer has.
        control: ids of special tokens: they control the model and are never text.
        unused: ids below len(tokens) without a token; a model must not emit them.
        added: ids of tokens that were added to the tokenizer's own, except white space: other tokenizers do not
            have them as text.
        shadowed: byte-fallback tokens of bytes that another token spells too (<0x41> beside A): the tokenizer
            never produces them.
    """

    tokens: list[bytes]
    special: dict[str, int]
    control: frozenset[int]
    unused: frozenset[int]
    shadowed: frozenset[int] = frozenset()
    added: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def text(self) -> list[int]:
        """Ids of tokens that stand for text, ascending."""
        return [i for i, token in enumerate(self.tokens) if token and i not in self.control]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: equal for tokenizers that map every id to the same byte string."""
        lengths = array("I", map(len, self.tokens))  # they mark where each token ends
        return hashlib.sha256(lengths.tobytes() + b"".join(self.tokens)).hexdigest()

    def is_text(self, token_id: int) -> bool:
        """Whether a token is text in every tokenizer of its family: neither a control token nor an added one."""
        return bool(self.tokens[token_id]) and token_id not in self.control and token_id not in self.added

    @cached_property
    def spelled(self) -> frozenset[bytes]:
        """The byte strings of all text tokens, whatever their ids."""
        return frozenset(self.tokens[i] for i in range(len(self.tokens)) if self.is_text(i))

    @cached_property
    def family(self) -> str:
        """Hash of the text tokens: equal for a base and for fine-tunes that add, rename or move control tokens."""
        spelled = sorted(self.spelled)
        lengths = array("I", map(len, spelled))
        return hashlib.sha256(lengths.tobytes() + b"".join(spelled)).hexdigest()

    def akin(self, other: Vocabulary) -> bool:
        """Whether both have the same text tokens, by id or by a permutation of ids."""
        return self is other or self.family == other.family

    def same_as(self, other: Vocabulary) -> bool:
        """Whether both map every id to the same byte string, whatever the tokenizers' names."""
        return self is other or self.fingerprint == other.fingerprint

    def first(self, size: int) -> Vocabulary:
        """The first `size` ids only, for a model with fewer rows than its tokenizer has ids."""
        if size >= len(self):
            return self
        parts = (self.control, self.unused, self.shadowed, self.added)
        sets = [frozenset(i for i in ids if i < size) for ids in parts]
        return Vocabulary(self.tokens[:size], {r: i for r, i in self.special.items() if i < size}, *sets)

    def with_role(self, role: str, token_id: int) -> Vocabulary:
        """This vocabulary with one more special token."""
        return replace(self, special={**self.special, role: token_id}, control=self.control | {token_id})

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: b"" for a control token."""
        return b"" if token_id in self.control else self.tokens[token_id]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """Read a transformers tokenizer (with a `tokenizers` backend) or a `tokenizers.Tokenizer`.

        Raises:
            VocabularyError: the tokenizer has no such backend.
        """
        return cls.from_json(tokenizer_json(tokenizer), tokenizer)

    @classmethod
    def from_json(cls, data: Any, tokenizer: Any = None) -> Vocabulary:
        """As from_tokenizer, from the content of a tokenizer.json; `tokenizer` provides the special tokens' roles.

        Raises:
            VocabularyError: the content is not a tokenizer's.
        """
        ids, added = _checked_ids(data), {token["content"]: token for token in _checked_added(data)}
        size = _checked_size([*ids.values(), *(token["id"] for token in added.values())])
        try:
            return cls._of(ids, added, size, _piece_decoder(data), tokenizer)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise VocabularyError(
                f"this tokenizer.json is malformed: {type(error).__name__}: {str(error)[:200]}"
            ) from error

    @classmethod
    def _of(
        cls,
        ids: dict[str, int],
        added: dict[str, dict[str, Any]],
        size: int,
        to_bytes: Callable[[str], bytes],
        tokenizer: Any,
    ) -> Vocabulary:
        tokens = [b""] * size
        used = [False] * size
        for piece, token_id in ids.items():
            tokens[token_id] = to_bytes(piece)
            used[token_id] = True
        for content, token in added.items():
            if token["special"] or ids.get(content) != token["id"]:  # else it is a piece of the model too
                tokens[token["id"]] = content.encode()
            used[token["id"]] = True
        special = {}
        for role in ("bos", "eos", "pad", "unk"):
            role_id = getattr(tokenizer, f"{role}_token_id", None)
            if role_id is not None:
                special[role] = int(role_id)
        control = {token["id"] for token in added.values() if token["special"]} | set(special.values())
        fallback = {i: tokens[i] for piece, i in ids.items() if _BYTE_TOKEN.fullmatch(piece) and len(tokens[i]) == 1}
        spelled = {tokens[i] for i in ids.values() if i not in fallback}
        return cls(
            tokens,
            special,
            control=frozenset(control),
            unused=frozenset(i for i in range(size) if not used[i]),
            shadowed=frozenset(i for i, byte in fallback.items() if byte in spelled),
            added=frozenset(token["id"] for token in added.values() if tokens[token["id"]].strip()),
        )


def _checked_ids(data: Any) -> dict[str, int]:
    """Id of each piece of a tokenizer's model.

    Raises:
        VocabularyError: there is no model of pieces.
    """
    model = data.get("model") if isinstance(data, Mapping) else None
    pieces = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(pieces, Mapping):
        ids = dict(pieces)
    elif isinstance(pieces, list) and all(isinstance(pair, list | tuple) and pair for pair in pieces):
        ids = {pair[0]: i for i, pair in enumerate(pieces)}
    else:
        raise VocabularyError("this is no tokenizer.json: it has no model with a vocabulary (model.vocab)")
    plain = {*map(type, ids)} <= {str} and {*map(type, ids.values())} <= {int} and min(ids.values(), default=0) >= 0
    wrong = (
        None
        if plain
        else next((piece for piece, i in ids.items() if not isinstance(piece, str) or not _is_id(i)), None)
    )
    if wrong is not None:
        raise VocabularyError(f"piece {str(wrong)[:40]!r} has the id {str(ids[wrong])[:40]}; an id is a number from 0")
    return ids


def _checked_added(data: Any) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.

    Raises:
        VocabularyError: one lacks its text or its id.
    """
    added = data.get("added_tokens") or []
    if not isinstance(added, list):
        raise VocabularyError(f"added_tokens must be a list, not {type(added).__name__}")
    for token in added:
        if not isinstance(token, Mapping) or not isinstance(token.get("content"), str) or not _is_id(token.get("id")):
            raise VocabularyError(f"added token {str(token)[:120]} needs a text (content) and a number from 0 (id)")
    return [{"special": False, **token} for token in added]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked_size(ids: Sequence[int]) -> int:
    """The number of ids, unused ones included.

    Raises:
        VocabularyError: an id is far greater than the number of tokens; every id below it would need memory.
    """
    size = max(ids, default=-1) + 1
    most = _HOLES * len(ids) + 2**16
    if size > most:
        raise VocabularyError(
            f"the highest id is {size - 1}, of {len(ids)} tokens; at most {most - 1} makes sense, the file is damaged"
        )
    return size


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


class _ByteOf(dict[int, int]):
    """The byte of each character of a byte-level alphabet; other characters map to one that is no byte."""

    def __missing__(self, character: int) -> int:
        return 0xFFFF


def _piece_decoder(data: dict[str, Any]) -> Callable[[str], bytes]:
    """A function from a piece of this tokenizer's model to its bytes, made from the tokenizer's parts."""
    parts = list(_parts(data.get("decoder"))) + list(_parts(data.get("pre_tokenizer")))
    types = {part.get("type") for part in parts}
    model = data["model"]
    suffix = model.get("end_of_word_suffix") or None
    if "ByteLevel" in types:
        byte_of = _ByteOf({ord(character): byte for byte, character in bytes_to_unicode().items()})

        def byte_level(piece: str) -> bytes:
            if suffix and piece.endswith(suffix):
                return byte_level(piece[: -len(suffix)]) + b" "
            try:
                return piece.translate(byte_of).encode("latin-1")
            except UnicodeEncodeError:
                return piece.encode()

        return byte_level
    patterns = [part.get("pattern") for part in parts if part.get("type") == "Replace"]
    marker = next((part.get("replacement") for part in parts if part.get("type") == "Metaspace"), None)
    if marker is None and ({"String": "▁"} in patterns or "▁" in str(data.get("normalizer"))):
        marker = "▁"
    prefix = model.get("continuing_subword_prefix") if model.get("type") == "WordPiece" else None

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


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a decoder or pre-tokenizer, with nested sequences flattened."""
    if not isinstance(part, Mapping):
        return
    if part.get("type") == "Sequence":
        for inner in part.get("decoders") or part.get("pretokenizers") or ():
            yield from _parts(inner)
    else:
        yield part
