"""The models that are served: the pack, and each of its members alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from packllm.engines.member import Author
from packllm.pack import Pack
from packllm.serve.errors import ServeError
from packllm.serve.protocol import PACK

_OF_SEVERAL = ("weighting", "pool", "fitted", "prior", "prior_strength", "adapt")
"""Options that say how members are weighed, of which one alone has no need."""


@dataclass(frozen=True)
class Served:
    """A model: its name, the pack that it is, and a hash of what its answers depend on."""

    name: str
    pack: Pack
    fingerprint: str

    def as_dict(self, created: int) -> dict[str, object]:
        """What /v1/models tells of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "packllm",
            "max_model_len": self.pack.context_window,
            "packllm": {"members": [member.name for member in self.pack.members], "fingerprint": self.fingerprint},
        }


class Models:
    """A pack and its members by name. A member that is called "pack" is served as a part of it only.

    Args:
        pack: all members.
    """

    def __init__(self, pack: Pack) -> None:
        self.pack, self.created = pack, int(time.time())
        packs = {PACK: pack}
        for member in pack.members:
            packs.setdefault(member.name, _alone(pack, member))
        self._served = {name: Served(name, one, f"packllm-{one.fingerprint[:16]}") for name, one in packs.items()}

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    def find(self, name: str) -> Served:
        """
        Raises:
            ServeError: 404, no model has this name.
        """
        if name not in self._served:
            raise ServeError(404, f"model={name!r} is none of: {', '.join(self._served)}", "model_not_found")
        return self._served[name]


def _alone(pack: Pack, member: Author) -> Pack:
    """A pack of one of the members, with its engine, what is kept of prompts, and the bound on caches."""
    options = pack.options.model_dump(exclude_unset=True)
    one = Pack([member], **{name: value for name, value in options.items() if name not in _OF_SEVERAL})
    one.prefixes, one._admission = pack.prefixes, pack._admission
    return one
