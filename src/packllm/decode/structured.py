"""Answers of a guaranteed form: a grammar masks the fused distribution before a token is chosen.

The mask comes from llguidance (https://github.com/guidance-ai/llguidance, extra `structured`). Of the libraries that
work on logits it is the one that compiles a JSON schema lazily, in milliseconds instead of building an automaton over
the vocabulary (outlines-core), that refuses a schema keyword it does not know instead of ignoring it, that takes a
vocabulary as plain byte strings, which is what all members of a pack share, and that needs nothing but itself
(xgrammar brings a compiler and its own tensor runtime).

JSON is written as json.dumps writes it, with one space after commas and colons: no model can lose itself in white
space. Where an answer is about to reach max_tokens, it is closed on the shortest way that the grammar allows, so that
it parses all the same; it then ends by "length". Only a max_tokens too small for any answer leaves it unfinished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from packllm.align.vocabulary import Vocabulary
from packllm.decode.sampling import Sampler
from packllm.errors import ExtraError, OptionError
from packllm.options import Options

llguidance: Any
try:
    import llguidance
except ImportError:  # the extra is not installed
    llguidance = None

_SPACING = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
_COMPOSED = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties")
_LEAST_LOGPROB = -1e30  # a token that the members rule out but the grammar demands can still be chosen
_CLOSE_TEXT = b'"0a'  # within a string, what ends it soonest; outside, what ends a value
_CLOSE_VALUE = b'}]ntf0123456789-"{['
_LONGEST_CLOSE = 512

_trees: WeakKeyDictionary[Vocabulary, Any] = WeakKeyDictionary()


def make_grammar(options: Options) -> str | None:
    """The grammar of the answers that the options allow; None if any text may be the answer.

    Raises:
        ExtraError: a form is to be guaranteed, and the extra is not installed.
        OptionError: a schema that cannot be guaranteed.
    """
    tools = options.offered_tools
    if options.tool_choice not in (None, "auto", "none", "any"):
        tools = tuple(tool for tool in tools if tool["function"]["name"] == options.tool_choice)
    elif options.tool_choice != "any" and options.json_schema is None:
        return None
    if llguidance is None:
        what = "json_schema" if options.json_schema is not None else f"tool_choice={options.tool_choice!r}"
        raise ExtraError(what, "llguidance", "structured")
    schemas = [(f"parameters of the tool {_name(tool)!r}", tool["function"].get("parameters")) for tool in tools]
    for what, schema in schemas:
        if re.search(r'"\$ref": "#(?!/(\$defs|definitions)/)', json.dumps(schema)):
            raise OptionError(
                f"{what} cannot be guaranteed: they refer to a part of themselves by its place; put it into $defs"
            )
    for what, schema in [*schemas, ("json_schema", options.json_schema)]:
        _check_schema(what, json.dumps(schema or {}))
    return _lark(tools, options.json_schema)


def _name(tool: Mapping[str, Any]) -> str:
    return tool["function"]["name"]


@lru_cache(256)
def _check_schema(what: str, schema: str) -> None:
    failed, said = llguidance.LLMatcher.validate_grammar_with_warnings(_lark((), json.loads(schema)))
    if failed:
        raise OptionError(
            f"{what} cannot be guaranteed: {' '.join(said[0].split())}. Say it with the keywords that a grammar can "
            f"follow (type, properties, required, items, enum, const, anyOf, pattern, minimum, ...), or go without "
            f"the guarantee and parse the text"
        )


def _lark(tools: Collection[Mapping[str, Any]], schema: Mapping[str, Any] | None) -> str:
    """A call of one of the tools, with or without Hermes' tags, or JSON of the schema, in llguidance's Lark."""
    rules, starts = [], []
    if tools:
        starts = ["call", '"<tool_call>\\n" call "\\n</tool_call>"']
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
        rules += [f"call_{i}: {_json_rule(_call_schema(tool))}" for i, tool in enumerate(tools)]
    if schema is not None:
        starts.append("json")
        rules.append(f"json: {_json_rule(schema)}")
    return "\n".join(["start: " + " | ".join(starts), *rules])


def _call_schema(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a call. Definitions stay where references to them look for them: at the top."""
    parameters = {"type": "object", "properties": {}, **(tool["function"].get("parameters") or {})}
    definitions = {key: parameters.pop(key) for key in ("$defs", "definitions") if key in parameters}
    properties = {"name": {"const": _name(tool)}, "arguments": parameters}
    return {"type": "object", "properties": properties, "required": ["name", "arguments"], **definitions}


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**_closed(schema), **_SPACING})


def _closed(schema: Any) -> Any:
    """The schema without properties that it does not name, where it does not ask for them: a small model would
    invent some. Schemas put together from parts stay as they are, for one part may allow what another names."""
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(key), Mapping):
            closed[key] = {name: _closed(inner) for name, inner in schema[key].items()}
    if isinstance(schema.get("items"), Mapping):
        closed["items"] = _closed(schema["items"])
    if "properties" in schema and not schema.keys() & {"additionalProperties", *_COMPOSED}:
        closed["additionalProperties"] = False
    return closed


class Constraint:
    """The form of one answer while it is generated.

    Args:
        grammar: from make_grammar.
        vocabulary: of the members that run.
        ends: ids that end an answer; allowed where the grammar allows an end.
        limit: most tokens of the answer.

    Attributes:
        complete: the answer is whole; nothing can follow.
        cut: the answer was closed because of the limit.
    """

    def __init__(self, grammar: str, vocabulary: Vocabulary, ends: Collection[int], limit: int) -> None:
        self._vocabulary, self._ends, self._room = vocabulary, sorted(ends), limit
        self._matcher = llguidance.LLMatcher(_tree(vocabulary), grammar, log_level=0)
        self._quoted, self._escaped = False, False
        self._way = self._way_out()
        self.complete, self.cut = False, False

    def wrap(self, sample: Sampler) -> Sampler:
        """A sampler that chooses as `sample` does, among the tokens that the grammar allows."""

        def constrained(logprobs: Tensor) -> int:
            mask = self._mask()
            allowed = torch.zeros(len(logprobs), dtype=torch.bool)
            size = min(len(mask) - 1, len(logprobs))
            allowed[:size] = torch.from_numpy(mask[:size])
            if mask[-1]:
                allowed[[token for token in self._ends if token < len(logprobs)]] = True
            allowed = allowed.to(logprobs.device)
            token = sample(logprobs.clamp(min=_LEAST_LOGPROB).masked_fill(~allowed, -torch.inf))
            return token if token in self._ends else self._follow(token)

        return constrained

    def _follow(self, token: int) -> int:
        """The token, or, where it would leave no room for a whole answer, one that ends the answer soon."""
        state = self._quoted, self._escaped
        self._consume(token)
        self._room -= 1
        way = self._way_out()
        if way is None and self._way:
            self._matcher.rollback(1)
            self._quoted, self._escaped = state
            token, *way = self._way
            self._consume(token)
            self.cut = True
        self._way = way
        self.complete = self._matcher.is_stopped()
        return token

    def _mask(self) -> np.ndarray:
        """Which ids the grammar allows: bool (V + 1,), the last for an end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=len(self._vocabulary) + 1, bitorder="little").view(bool)
        if not mask.any():
            reason = self._matcher.get_error() or self._matcher.stop_reason()
            raise OptionError(f"the form of the answer cannot be followed: {reason}; use a simpler schema")
        return mask

    def _consume(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise OptionError(f"the form of the answer cannot be followed: {self._matcher.get_error()}")
        self._quoted, self._escaped = _quotes(self._vocabulary.tokens[token], self._quoted, self._escaped)

    def _way_out(self) -> list[int] | None:
        """Tokens that end the answer soonest, as far as a greedy choice finds them; None if they do not fit."""
        way: list[int] = []
        quoted, escaped = self._quoted, self._escaped
        closers = _closers(self._vocabulary)
        while not self._matcher.is_stopped():
            mask = self._mask()
            if mask[-1]:
                break
            if len(way) >= min(self._room, _LONGEST_CLOSE):
                self._matcher.rollback(len(way))
                return None
            token = next((i for i in closers[quoted] if mask[i]), int(mask.argmax()))
            self._matcher.consume_token(token)
            way.append(token)
            quoted, escaped = _quotes(self._vocabulary.tokens[token], quoted, escaped)
        self._matcher.rollback(len(way))
        return way


def _quotes(text: bytes, quoted: bool, escaped: bool) -> tuple[bool, bool]:
    """Whether JSON is within a string, and right after a backslash in it, once `text` is appended."""
    for byte in text:
        if escaped:
            escaped = False
        elif byte == 0x5C and quoted:
            escaped = True
        elif byte == 0x22:
            quoted = not quoted
    return quoted, escaped


def _closers(vocabulary: Vocabulary) -> dict[bool, list[int]]:
    """Ids of the tokens that end JSON soonest, best first: outside of a string, and within one."""
    return _prepared(vocabulary)[1]


def _tree(vocabulary: Vocabulary) -> Any:
    return _prepared(vocabulary)[0]


def _prepared(vocabulary: Vocabulary) -> tuple[Any, dict[bool, list[int]]]:
    if vocabulary not in _trees:
        id_of = {token: i for i, token in reversed(list(enumerate(vocabulary.tokens))) if i not in vocabulary.control}
        closers = {
            quoted: [id_of[bytes([byte])] for byte in order if bytes([byte]) in id_of]
            for quoted, order in ((False, _CLOSE_VALUE), (True, _CLOSE_TEXT))
        }
        _trees[vocabulary] = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(vocabulary, id_of))), closers
    return _trees[vocabulary]


class _Tokens:
    """A vocabulary as llguidance wants it: one more id, which stands for every end."""

    def __init__(self, vocabulary: Vocabulary, id_of: Mapping[bytes, int]) -> None:
        end = len(vocabulary)
        self.eos_token_id, self.bos_token_id = end, None
        self.tokens = [*vocabulary.tokens, b"<end>"]
        self.special_token_ids = sorted({*vocabulary.control, *vocabulary.unused, end})
        self._id_of, self._longest = id_of, max(map(len, id_of))

    def __call__(self, text: bytes) -> list[int]:
        """Ids of a text that the grammar forces, longest tokens first."""
        ids, at = [], 0
        while at < len(text):
            stop = next(n for n in range(min(self._longest, len(text) - at), 0, -1) if text[at : at + n] in self._id_of)
            ids.append(self._id_of[text[at : at + stop]])
            at += stop
        return ids
