"""An answer that just fits its limit is written as the model wants it."""

from __future__ import annotations

import pytest
from wanting import Wanting

BOOLEAN, NUMBER, INTEGER, TEXT = ({"type": kind} for kind in ("boolean", "number", "integer", "string"))


def of(**properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.fixture(scope="module")
def wanting() -> Wanting:
    return Wanting()


@pytest.mark.parametrize("room", [0, 1, 9])
@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (of(a=BOOLEAN), '{"a": false}'),
        (of(a=NUMBER, b=INTEGER), '{"a": 0.25, "b": 7}'),
        (of(a=TEXT, b=BOOLEAN), '{"a": "hello", "b": false}'),
        ({"type": "array", "items": NUMBER, "minItems": 2}, "[0.25, 7]"),
        ({"type": "array", "items": INTEGER}, "[1, 22, 333]"),
        (of(a={"type": "string", "pattern": "^[a-z]{2,5}$"}), '{"a": "abcde"}'),
        (of(a={"anyOf": [INTEGER, {"type": "null"}]}), '{"a": null}'),
        (of(d={"type": "string", "format": "date"}, x=INTEGER), '{"d": "2024-02-29", "x": 12}'),
    ],
)
def test_an_answer_that_fits_is_the_models_own(wanting, schema, text, room):
    answer = wanting.ask(text, json_schema=schema, max_tokens=len(text) + room)  # one token a byte
    assert (answer.text, answer.finish_reason) == (text, "stop")
