"""JSON schemas of Python types, complete enough that any value that satisfies one can be parsed."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

_DECIMAL = r"^[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)$"
_KEYS = {"int": r"^-?(?:0|[1-9][0-9]*)$", "float": r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?$", "decimal": _DECIMAL}


class _Full(GenerateJsonSchema):
    """pydantic's generator, plus the spelling of Decimals and of numbers as keys."""

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        result = super().decimal_schema(schema)
        for option in result.get("anyOf", ()):
            if option.get("type") == "string":
                option["pattern"] = _DECIMAL
        return result

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        result = super().dict_schema(schema)
        pattern = _KEYS.get(schema.get("keys_schema", {}).get("type", ""))
        return {**result, "propertyNames": {"pattern": pattern}} if pattern else result


def schema_of_type(kind: Any) -> dict[str, Any]:
    """The JSON schema of a type that pydantic can parse: a model class, a dataclass, an enumeration, list[int], ...

    Raises:
        PydanticUserError: the type has no schema.
    """
    return TypeAdapter(kind).json_schema(schema_generator=_Full)
