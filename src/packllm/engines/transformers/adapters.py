"""Several LoRA adapters on one copy of their base; each token of a pass uses its own adapter (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from packllm.engines.transformers.files import check_finite
from packllm.engines.transformers.lora import Factors, add, check_fit

_Part = tuple[slice, int, Tensor, Tensor]
"""Rows, the number of adapters that share them evenly, and these adapters' factors of one module."""


class Adapters:
    """The adapters of one base: a single pass over the base's weights serves rows of all of them.

    A hook on each changed module adds up · (down · x) to its output, in one batched product for neighbouring adapters.
    Outside use() the base computes as without adapters.

    Args:
        base: a loaded transformers model.
    """

    def __init__(self, base: Any) -> None:
        self._base, self._count = base, 0
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._cut: tuple[tuple[int | None, ...], dict[str, list[_Part]]] = (), {}  # factors for the latest use()
        self._parts: dict[str, list[_Part]] = {}  # for the active use()

    def attach(self, factors: Factors, what: str = "an adapter") -> int:
        """Add an adapter and return its index.

        Args:
            factors: its update of each module.
            what: its name in error messages.

        Raises:
            LoadError: it changes modules that the base lacks, has elsewhere or has in another shape, or its numbers
                exceed the base's number format.
        """
        check_fit(self._base, factors, what)
        dtypes = {name: self._base.get_submodule(name).weight.dtype for name in factors}
        for name, pair in factors.items():
            check_finite({f"{name}.lora_{part}": t.to(dtypes[name]) for part, t in zip("AB", pair, strict=True)}, what)
        for name in factors:
            if name not in self._stacks:
                self._base.get_submodule(name).register_forward_hook(_Hook(self, name))
        for name in {**self._stacks, **factors}:
            self._stacks[name] = self._grown(name, factors.get(name))
        self._count += 1
        self._cut = (), {}
        return self._count - 1

    def _grown(self, name: str, added: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The factors of all adapters for one module, including a new one: (J, in, r) and (J, r, out); zeros where an
        adapter does not change the module or has a lower rank."""
        pairs = [*self._pairs(name), added]
        first = next(pair for pair in pairs if pair is not None)
        rank = max(pair[0].shape[0] for pair in pairs if pair is not None)
        weight = self._base.get_submodule(name).weight
        downs = weight.new_zeros(len(pairs), first[0].shape[1], rank)
        ups = weight.new_zeros(len(pairs), rank, first[1].shape[0])
        for at, pair in enumerate(pairs):
            if pair is not None:
                downs[at, :, : pair[0].shape[0]], ups[at, : pair[1].shape[1]] = pair[0].T, pair[1].T
        return downs, ups

    def _pairs(self, name: str) -> list[tuple[Tensor, Tensor] | None]:
        """The factors (down, up) of each adapter for a module; None for adapters that do not change it."""
        if name not in self._stacks:
            return [None] * self._count
        return [(down.T, up.T) for down, up in zip(*self._stacks[name], strict=True)]

    @contextmanager
    def use(self, chosen: Sequence[int | None]) -> Iterator[None]:
        """Within this context, token i of a pass with one row uses adapter chosen[i], or none."""
        if self._cut[0] != tuple(chosen):  # kept between steps, because slicing takes as long as the products
            self._cut = tuple(chosen), self._cuts(_plan(chosen))
        self._parts = self._cut[1]
        try:
            yield
        finally:
            self._parts = {}

    def _cuts(self, plan: list[tuple[slice, slice]]) -> dict[str, list[_Part]]:
        return {
            name: [(rows, each.stop - each.start, downs[each], ups[each]) for rows, each in plan]
            for name, (downs, ups) in self._stacks.items()
        }

    def update(self, name: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Add each token's own update to a module's outputs (1, n, out) for inputs (1, n, in)."""
        flat, added = inputs.view(-1, inputs.shape[-1]), outputs.view(-1, outputs.shape[-1])
        for tokens, count, down, up in self._parts.get(name, ()):
            part = flat[tokens].reshape(count, -1, flat.shape[-1])
            added[tokens].view(count, -1, added.shape[-1]).baddbmm_(torch.bmm(part, down), up)
        return outputs

    def factors(self, index: int) -> Factors:
        """An adapter's factors: those given to attach(), in the base's dtype and possibly padded with zeros."""
        return {name: (downs[index].T, ups[index].T) for name, (downs, ups) in self._stacks.items()}

    def merged(self, index: int) -> Any:
        """A separate model: a copy of the base with the adapter added to its weights."""
        return add(self._base, {name: (down.float(), up.float()) for name, (down, up) in self.factors(index).items()})


class _Hook:
    """A module's forward hook. In a copy of the base it does nothing, because its weights contain the adapter."""

    def __init__(self, adapters: Adapters | None, name: str) -> None:
        self._adapters, self._name = adapters, name

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        return outputs if self._adapters is None else self._adapters.update(self._name, inputs[0], outputs)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None, self._name)


def _plan(chosen: Sequence[int | None]) -> list[tuple[slice, slice]]:
    """Group rows by adapters, in order: successive runs with equally many rows and successive adapters become one entry
    (rows, adapters), in which the adapters share the rows evenly."""
    runs: list[list[int]] = []  # adapter, first row, stop
    for row, adapter in enumerate(chosen):
        if adapter is None:
            continue
        if runs and runs[-1][0] == adapter and runs[-1][2] == row:
            runs[-1][2] = row + 1
        else:
            runs.append([adapter, row, row + 1])
    plan: list[tuple[slice, slice]] = []
    for adapter, start, stop in runs:
        if plan:
            rows, adapters = plan[-1]
            each = (rows.stop - rows.start) // (adapters.stop - adapters.start)
            if rows.stop == start and adapters.stop == adapter and stop - start == each:
                plan[-1] = slice(rows.start, stop), slice(adapters.start, adapter + 1)
                continue
        plan.append((slice(start, stop), slice(adapter, adapter + 1)))
    return plan
