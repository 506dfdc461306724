"""The failure policy: what happens to a request when some of its members fail. No other module decides this."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from packllm.errors import MemberError, blamed_on, unquoted
from packllm.weights.result import Weights

log = logging.getLogger("packllm")

T = TypeVar("T")


class Weighed(Protocol):
    """An object with weights, from which a member may be dropped."""

    weights: Weights


class Failures:
    """The members of one request that failed so far, and whether the request continues without them. Safe to use from
    several threads: members on different devices may fail at the same time.

    Args:
        names: the names of all members of the pack.
        candidates: indices of the members that may run.
        drop: continue without a failed member instead of raising.

    Attributes:
        drop: as above.
        members: indices of the failed members that the request continues without.
    """

    def __init__(self, names: Sequence[str], candidates: Collection[int], drop: bool) -> None:
        self._names, self._candidates, self.drop = names, set(candidates), drop
        self._lock = threading.Lock()
        self.members: set[int] = set()

    def lose(
        self, error: Exception, among: Collection[int], weights: Sequence[Weights] = ()
    ) -> tuple[set[int], list[Weights]]:
        """Continue without the members that an error names, or raise the error.

        Args:
            error: the exception.
            among: the members whose work raised it. If the error names none of these, all of them are dropped: they
                shared the pass that failed.
            weights: of each prompt in which these members have weight, if weights are known.

        Returns:
            The members to drop, and the weights without them.

        Raises:
            Exception: the error itself, if it is no MemberError, members are not to be dropped, or a prompt would have
                no member left.
        """
        if not isinstance(error, MemberError):
            raise error
        dropped = {k for k in among if self._names[k] == error.member} or set(among)
        remaining = [without(one, dropped) for one in weights]
        with self._lock:
            if not self.drop or self._candidates <= self.members | dropped or None in remaining:
                raise error
            self.members |= dropped
        log.warning("going on without a member: %s", unquoted(error))
        return dropped, [one for one in remaining if one is not None]

    def each(self, act: Callable[[int], T], which: Collection[int], row: Weighed) -> dict[int, T]:
        """Call `act` for each of these members and return its results. A member that fails is dropped from the row's
        weights if the request continues without it.

        Raises:
            MemberError: the request does not continue, or all of these members failed.
        """
        results: dict[int, T] = {}
        failed: MemberError | None = None
        for k in which:
            try:
                with blamed_on(self._names[k]):
                    results[k] = act(k)
            except MemberError as error:
                _, [row.weights] = self.lose(error, [k], [row.weights])
                failed = error
        if failed and not results:
            raise failed
        return results


def without(weights: Weights, members: Collection[int]) -> Weights | None:
    """Weights with these members at 0 and the others renormalised; None if the others sum to 0 or less."""
    values = [0.0 if k in members else value for k, value in enumerate(weights.values)]
    if math.fsum(values) <= 0:  # no member is left, or only DExperts' anti-expert
        return None
    return replace(weights, values=normalised(values), fused_nll=None, gap=None)


def normalised(values: Sequence[float]) -> tuple[float, ...]:
    """The values divided by their sum."""
    total = math.fsum(values)
    return tuple(value / total for value in values)
