"""What all request bodies have in common: fields, limits, and the names of fields in errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, model_validator

from packllm.errors import OptionError, guess, shown
from packllm.options import FirstErrors, Number, Options
from packllm.serve.unsupported import UNSUPPORTED, Unsupported, check_supported

PACK = "pack"
"""Name of the model that consists of all members."""

SERVERS_OWN = frozenset({"fitted", "max_cache_mb", "prefix_cache_mb", "batch_size"})
"""Options of the server that requests cannot set: they name files of the server, or concern the whole pack."""

SAID_ELSEWHERE = frozenset(
    {"n", "tools", "tool_choice", "json_schema", "logprobs", "top_logprobs", "logprob_token_ids", "timeout"}
)
"""Options for which OpenAI has its own fields."""

Seconds = Annotated[Number, Field(gt=0)]


DEEPEST = 100
"""Most lists and objects of a body inside each other. What parses them later may have no stack for more."""


def plain(body: Any) -> Any:
    """A body without fields that are null: these are as good as missing ones.

    Raises:
        ValueError: a field is nested too deeply, or has a number that JSON does not have.
    """
    if not isinstance(body, dict):
        return body
    for name, value in body.items():
        name.encode()
        _check_nesting(name, value)
    return {name: value for name, value in body.items() if value is not None}


def _check_nesting(name: str, value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        if not all(math.isfinite(one) for one in level if type(one) is float):
            raise ValueError(f"{name}: JSON has no NaN and no infinite numbers")
        insides = [one.values() if type(one) is dict else one for one in level if type(one) in (dict, list)]
        if not insides:
            return
        level = [one for inside in insides for one in inside if type(one) in (dict, list, float)]
    raise ValueError(f"{name}: more than {DEEPEST} lists and objects inside each other")


class Body(FirstErrors):
    """Fields of all requests. Fields that do not affect the answer (user, metadata, store, ...) are ignored."""

    model_config = ConfigDict(extra="allow")

    NAMES: ClassVar[Mapping[str, str | None]] = {"messages": None, "max_tokens": None}
    """The request's field for an option of the pack, where it has another name; None: there is no such field."""
    MORE: ClassVar[Unsupported] = {}
    """Further unsupported fields."""

    model: str = PACK
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    timeout: Seconds | None = None
    packllm: dict[str, Any] = Field(default_factory=dict)
    """Further options of the pack: weighting, pool, tau, ..."""

    _plain = model_validator(mode="before")(plain)

    def named(self, option: str) -> str | None:
        """The request's field that an option of the pack comes from."""
        return "packllm" if option in self.packllm else self.NAMES.get(option, option)

    def options(self) -> dict[str, Any]:
        """The pack's options that these fields stand for.

        Raises:
            OptionError, ServeError: a field is not supported, or may not be set by requests.
        """
        check_supported(self.model_extra or {}, {**UNSUPPORTED, **self.MORE})
        for name in self.packllm:
            if name not in Options.model_fields:
                valid = sorted(Options.model_fields.keys() - SERVERS_OWN - SAID_ELSEWHERE)
                raise OptionError(
                    f"packllm={{{shown(name)}: ...}} is not an option{guess(name, valid)} "
                    f"Valid options: {', '.join(valid)}"
                )
            if name in SERVERS_OWN or (name == "prior" and isinstance(self.packllm[name], str)):
                raise OptionError(f"packllm={{{name!r}: ...}} can only be set when the server is started")
            if name in SAID_ELSEWHERE:
                raise OptionError(f"packllm={{{name!r}: ...}} must be given as a field of the request")
        salt = {} if self.cache_salt is None else {"cache_salt": self.cache_salt}
        return {**self.packllm, **salt}
