"""The models that the server offers: the pack, and each member alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from packllm.engines.member import Author
from packllm.pack import Pack
from packllm.serve.body import PACK
from packllm.serve.errors import ServeError

_OF_SEVERAL = ("weighting", "pool", "fitted", "prior", "prior_strength", "adapt")
"""Options of the weighting, which a pack of one member does not use."""


@dataclass(frozen=True)
class Served:
    """A served model: its name, its pack, and a hash of everything that its answers depend on."""

    name: str
    pack: Pack
    fingerprint: str

    def as_dict(self, created: int) -> dict[str, object]:
        """The model's entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "packllm",
            "max_model_len": self.pack.context_window,
            "packllm": {"members": [member.name for member in self.pack.members], "fingerprint": self.fingerprint},
        }


class Models:
    """A pack and its members, by name. A member with the name "pack" is not served alone.

    Args:
        pack: the pack with all members.
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
        """The model with a name.

        Raises:
            ServeError: 404, no model has this name.
        """
        if name not in self._served:
            raise ServeError(
                404,
                f"model={name!r} does not exist; the models are: {', '.join(self._served)}",
                "model_not_found",
                "model",
            )
        return self._served[name]


def _alone(pack: Pack, member: Author) -> Pack:
    """A pack of one member, which shares the engine, the prefix cache and the memory limit of the caches."""
    options = pack.options.model_dump(exclude_unset=True)
    one = Pack([member], **{name: value for name, value in options.items() if name not in _OF_SEVERAL})
    one.prefixes, one._admission = pack.prefixes, pack._admission
    return one
