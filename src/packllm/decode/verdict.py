"""Checks an answer against its JSON schema, where a grammar cannot express all of the schema.

This is needed for keywords such as uniqueItems, not, if and contains. Such an answer is held back until it is complete,
because streamed text cannot be taken back. If it violates its schema, a second one is drawn at random; if that one does
too, an error is raised.
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
    """Yield the chunks of answers, with the complete text in the last one, once it satisfies its schema.

    Args:
        chunks: of several answers, as (row, Chunk).
        options: of the request.
        anew: makes the chunks of another answer for a row.

    Raises:
        StructureError: two answers to one prompt violate the schema.
        ExtraError: jsonschema is not installed.
    """
    if jsonschema is None:
        raise ExtraError("a schema that says more than a grammar can", "jsonschema", "structured")
    violating = []
    for row, chunk in _complete(chunks):
        if chunk.finish_reason is None or violation(chunk.text, options) is None:
            yield row, chunk
        else:
            violating.append(row)
    for row in violating:
        with closing(anew(row)) as retry:  # type: ignore[type-var]
            for _, chunk in _complete(retry):
                fault = violation(chunk.text, options) if chunk.finish_reason is not None else None
                if fault is not None:
                    raise StructureError(chunk.text, fault)
                yield row, chunk


def drawn_anew(options: Options) -> Options:
    """The options of the second answer: sampled instead of greedy, or with the next seed."""
    if options.temperature == 0:
        return options.override({"temperature": 1.0, "seed": options.seed or 0})
    # Far from the seeds of the other answers to the prompt (see the option n), whose answers these would be.
    return options if options.seed is None else options.override({"seed": (options.seed + 2**32) % 2**64})


def violation(text: str, options: Options) -> str | None:
    """How an answer violates its schema; None if it does not."""
    try:
        value = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    except ValueError as error:  # an integer with thousands of digits
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
    except (AttributeError, TypeError, re.error, RecursionError, referencing.exceptions.Unresolvable):
        return None  # jsonschema cannot check this; the grammar is the only guarantee
    return None if error is None else f"at {error.json_path}: {error.message}"[:_MOST_SAID]


def _extended(validator: Any) -> Any:
    """A validator that skips patterns that Python's `re` cannot compile: the grammar guarantees these."""
    check = validator.VALIDATORS.get("pattern")

    def pattern(*args: Any) -> Iterator[Any]:
        try:
            yield from check(*args) or ()
        except re.error:
            return

    return jsonschema.validators.extend(validator, {"pattern": pattern}) if check else validator


def _complete(chunks: Chunks) -> Chunks:
    """The chunks with an answer's whole text in its last one. The empty ones before it let a caller cancel."""
    chunks_of: dict[int, list[Chunk]] = {}
    for row, chunk in chunks:
        so_far = chunks_of.setdefault(row, [])
        so_far.append(chunk)
        if chunk.finish_reason is None:
            yield row, replace(chunk, text="", logprobs=None)
        else:
            yield row, replace(chunk, text="".join(part.text for part in so_far), logprobs=logprobs_of(so_far))
