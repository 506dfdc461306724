"""What a grammar cannot say of an answer: the whole answer is held against the whole schema.

Only schemas that say more than their grammar (uniqueItems, not, if, contains, ...) need it. Their answers are held
back until they are whole, for nothing that was streamed can be taken back. One that violates its schema is drawn anew,
once and at random; if that one does too, an error says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from packllm.decode.grammar import demanded_tools
from packllm.errors import ExtraError, StructureError
from packllm.options import Options
from packllm.results import Chunk, logprobs_of

try:
    import jsonschema
    import referencing.exceptions
except ImportError:  # the extra is not installed
    jsonschema = None

Chunks = Iterator[tuple[int, Chunk]]
_MOST_SAID = 200


def judged(chunks: Chunks, options: Options, anew: Callable[[int], Chunks]) -> Generator[tuple[int, Chunk], None, None]:
    """The chunks of answers, each with all of its text in the last one, once that fits its schema.

    Args:
        chunks: of several answers, as (row, Chunk).
        options: of the request.
        anew: gives the chunks of another answer to the prompt of a row.

    Raises:
        StructureError: two answers to one prompt violate the schema.
        ExtraError: jsonschema is not installed.
    """
    if jsonschema is None:
        raise ExtraError("a schema that says more than a grammar can", "jsonschema", "structured")
    wrong = []
    for row, chunk in _whole(chunks):
        if chunk.finish_reason is None or violation(chunk.text, options) is None:
            yield row, chunk
        else:
            wrong.append(row)
    for row in wrong:
        with closing(anew(row)) as again:  # type: ignore[type-var]
            for _, chunk in _whole(again):
                fault = violation(chunk.text, options) if chunk.finish_reason is not None else None
                if fault is not None:
                    raise StructureError(chunk.text, fault)
                yield row, chunk


def drawn_anew(options: Options) -> Options:
    """The options under which an answer is drawn again: at random, but by a seed where the first one was certain."""
    if options.temperature == 0:
        return options.override({"temperature": 1.0, "seed": options.seed or 0})
    return options if options.seed is None else options.override({"seed": (options.seed + 1) % 2**64})


def violation(text: str, options: Options) -> str | None:
    """How an answer violates the schema that it was to have; None if it does not."""
    try:
        value = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    except ValueError as error:  # an integer of thousands of digits
        return str(error)[:_MOST_SAID]
    faults = []
    if options.json_schema is not None:
        faults.append(_fault(value, options.json_schema))
    for tool in demanded_tools(options):
        if isinstance(value, dict) and value.get("name") == tool["function"]["name"] and "arguments" in value:
            faults.append(_fault(value["arguments"], tool["function"].get("parameters") or {}))
    return None if None in faults else faults[-1]


def _fault(value: Any, schema: dict[str, Any]) -> str | None:
    validator = _extended(jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator))(schema)
    try:
        error = jsonschema.exceptions.best_match(validator.iter_errors(value))
    except (re.error, RecursionError, referencing.exceptions.Unresolvable):
        return None  # a pattern of another flavour, or what jsonschema cannot follow: the grammar alone guarantees
    return None if error is None else f"at {error.json_path}: {error.message}"[:_MOST_SAID]


def _extended(validator: Any) -> Any:
    """A validator that leaves patterns to the grammar which Python cannot read."""
    known = validator.VALIDATORS.get("pattern")

    def pattern(*args: Any) -> Iterator[Any]:
        try:
            yield from known(*args) or ()
        except re.error:
            return

    return jsonschema.validators.extend(validator, {"pattern": pattern}) if known else validator


def _whole(chunks: Chunks) -> Chunks:
    """The chunks with all text of an answer in its last one. The empty ones before it let a caller stop the work."""
    before: dict[int, list[Chunk]] = {}
    for row, chunk in chunks:
        so_far = before.setdefault(row, [])
        so_far.append(chunk)
        if chunk.finish_reason is None:
            yield row, replace(chunk, text="", logprobs=None)
        else:
            yield row, replace(chunk, text="".join(part.text for part in so_far), logprobs=logprobs_of(so_far))
