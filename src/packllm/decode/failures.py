"""What becomes of a request whose members fail: decided here and nowhere else."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from packllm.errors import MemberError, blamed_on
from packllm.weights.result import Weights

log = logging.getLogger("packllm")

T = TypeVar("T")


class Weighed(Protocol):
    """What has weights, which may lose a member."""

    weights: Weights


class Failures:
    """The members of one request that failed so far, and whether it goes on without them. Safe to use from several
    threads: members on different devices may fail at the same time.

    Args:
        names: the names of all members of the pack.
        candidates: indices of those that may run.
        drop: go on without a member that fails, instead of raising.

    Attributes:
        drop: as given.
        members: indices of those that failed and are done without.
    """

    def __init__(self, names: Sequence[str], candidates: Collection[int], drop: bool) -> None:
        self._names, self._candidates, self.drop = names, set(candidates), drop
        self._lock = threading.Lock()
        self.members: set[int] = set()

    def lose(
        self, error: Exception, among: Collection[int], weights: Sequence[Weights] = ()
    ) -> tuple[set[int], list[Weights]]:
        """Go on without the members that an error names, or raise it.

        Args:
            error: what was raised.
            among: the members whose work it came from. Where it names none of them alone, all failed: a pass that
                members share takes them all along.
            weights: of each prompt in which they count for something, if it is weighed.

        Returns:
            The members to do without, and the weights without them.

        Raises:
            Exception: the error, where it is no MemberError, members are not to be dropped, or nobody is left to go
                on, be it for one of the prompts.
        """
        if not isinstance(error, MemberError):
            raise error
        lost = {k for k in among if self._names[k] == error.member} or set(among)
        left = [without(one, lost) for one in weights]
        with self._lock:
            if not self.drop or self._candidates <= self.members | lost or None in left:
                raise error
            self.members |= lost
        log.warning("going on without a member: %s", error)
        return lost, [one for one in left if one is not None]

    def each(self, act: Callable[[int], T], which: Collection[int], row: Weighed) -> dict[int, T]:
        """What `act` gives for each of these members; the row's weights lose those that fail, if the request goes on
        without them.

        Raises:
            MemberError: it does not, or all of these failed.
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
    """Weights with these members at 0 and the others renormalised; None where the others make no distribution."""
    values = [0.0 if k in members else value for k, value in enumerate(weights.values)]
    if math.fsum(values) <= 0:  # nobody is left, or of DExperts' base, expert and anti-expert the wrong ones
        return None
    return replace(weights, values=normalised(values), fused_nll=None, gap=None)


def normalised(values: Sequence[float]) -> tuple[float, ...]:
    """The values over their sum."""
    total = math.fsum(values)
    return tuple(value / total for value in values)
