"""JSON schemas of Python types, which say all that their values are held to."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

_DECIMAL = r"^[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)$"
_KEYS = {"int": r"^-?(?:0|[1-9][0-9]*)$", "float": r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?$", "decimal": _DECIMAL}


class _Full(GenerateJsonSchema):
    """pydantic's, which leaves out how a Decimal and a number that is a key are spelled."""

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        made = super().decimal_schema(schema)
        for option in made.get("anyOf", ()):
            if option.get("type") == "string":
                option["pattern"] = _DECIMAL
        return made

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        made = super().dict_schema(schema)
        pattern = _KEYS.get(schema.get("keys_schema", {}).get("type", ""))
        return {**made, "propertyNames": {"pattern": pattern}} if pattern else made


def schema_of_type(kind: Any) -> dict[str, Any]:
    """The JSON schema of what pydantic can read as `kind`: a model class, a dataclass, an enumeration, list[int] ...

    Raises:
        PydanticUserError: there is none.
    """
    return TypeAdapter(kind).json_schema(schema_generator=_Full)
