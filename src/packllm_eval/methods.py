"""Methods to compare: weightings with their options, over all members or some."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packllm.errors import OptionError
from packllm.options import Options
from packllm.pack import Pack
from packllm.weights import find, tfidf

_SPEC = re.compile(r"(?P<weighting>[\w-]+)(@(?P<members>[^:]+))?(:(?P<options>.+))?")

DEFAULT = ("em", "uniform", "top1", "sim", "sim:tau=1", "opt", "exact", "map")
"""The default methods; those that need logits are used only if the members share a vocabulary."""


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        label: name of the row.
        options: request options: `weighting` and others.
        members: names of the members it may use, in order; None: the whole pack.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, spec: str) -> Method:
        """Parse WEIGHTING, WEIGHTING:name=value,... or WEIGHTING@member+member:name=value."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise OptionError(f"method {spec!r} is not WEIGHTING[@member+member][:name=value,...]")
        options: dict[str, Any] = {"weighting": match["weighting"]}
        for pair in (match["options"] or "").split(",") if match["options"] else ():
            name, equals, value = pair.partition("=")
            if not equals:
                raise OptionError(f"method {spec!r}: {pair!r} has no '='; write name=value")
            options[name.strip()] = value
        members = tuple(match["members"].split("+")) if match["members"] else None
        return cls(spec, options, members)


@dataclass(frozen=True)
class Ready:
    """A method checked against a pack: its options and the indices of its members."""

    label: str
    options: Options
    members: tuple[int, ...]

    def described(self) -> dict[str, Any]:
        """The JSON-safe settings that its results depend on, beside the members themselves."""
        settings = self.options.model_dump(mode="json", exclude_defaults=True)
        if self.options.fitted is not None:
            settings["fitted"] = hashlib.sha256(Path(self.options.fitted).read_bytes()).hexdigest()[:16]
        return {"members": list(self.members), **settings}


def ready(pack: Pack, methods: Sequence[Method | str] | None) -> list[Ready]:
    """Check methods against the pack; None: the methods of DEFAULT that fit it.

    Raises:
        OptionError: an unknown weighting, option or member, two methods with one label, or a weighting that
            needs logits over members with different vocabularies.
        WeightsError: cbtm or router without a valid fitted file.
    """
    chosen = [Method.parse(m) if isinstance(m, str) else m for m in (DEFAULT if methods is None else methods)]
    names = [member.name for member in pack.members]
    checked: list[Ready] = []
    for method in chosen:
        unknown = [name for name in method.members or () if name not in names]
        if unknown:
            raise OptionError(f"method {method.label!r} names member {unknown[0]!r}; members: {', '.join(names)}")
        members = tuple(names.index(name) for name in method.members or names)
        options = pack.check(**method.options)
        if not one_vocabulary(pack, members) and options.decoding != "mined":
            if isinstance(options.weighting, str) and find(options.weighting).needs_logits:
                if methods is None:
                    continue
                raise OptionError(f"method {method.label!r} needs members of one vocabulary, or decoding=mined")
            if options.pool is None:
                options = options.override({"pool": "linear"})  # the log pool cannot be normalised over words
        elif isinstance(options.weighting, str):
            find(options.weighting)
        if options.weighting in ("cbtm", "router"):
            tfidf.load(options.fitted, options.weighting)
        if any(method.label == other.label for other in checked):
            raise OptionError(f"two methods are called {method.label!r}")
        checked.append(Ready(method.label, options, members))
    return checked


def singles(pack: Pack) -> list[Method]:
    """Every member alone."""
    return [Method(f"member {m.name}", {"weighting": {m.name: 1.0}}, (m.name,)) for m in pack.members]


def described(methods: Sequence[Ready]) -> dict[str, Any]:
    """The settings that the results of methods depend on, by label."""
    return {method.label: method.described() for method in methods}


def one_vocabulary(pack: Pack, members: Sequence[int]) -> bool:
    """Whether these members can be fused token by token."""
    first = pack.members[members[0]].vocabulary
    return all(pack.members[k].vocabulary.akin(first) for k in members[1:])


def largest(pack: Pack) -> str:
    """Name of the member with the largest weights in bytes (the first among equals): a reference row of the paper."""
    return max(pack.models, key=lambda member: member.engine.size).name
