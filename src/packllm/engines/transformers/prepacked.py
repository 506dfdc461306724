"""Weights in oneDNN's own layout, beside the plain ones: products of several rows on a CPU are faster with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from packllm.errors import LoadError

ROWS = 8
"""Rows that the layout is chosen for."""


class Prepacked:
    """The float32 linear layers of a model on a CPU, in a second layout.

    Within use() they compute products of two or more rows with it. One row is as fast with the plain weights.

    Args:
        model: a transformers model.

    Attributes:
        size: bytes of the second layout.

    Raises:
        LoadError: the model has no such layers, or torch was built without oneDNN.
    """

    def __init__(self, model: Any) -> None:
        if not torch.backends.mkldnn.is_available():
            raise LoadError("prepack=True needs a torch with oneDNN, which this build lacks; leave it out")
        layers = [module for module in model.modules() if can_prepack(module) and not module.weight.is_meta]
        if not layers:
            raise LoadError(
                f"prepack=True is for linear layers in float32 on a CPU; {type(model).__name__} has none; leave it "
                f"out, or give dtype='float32'"
            )
        packed: dict[int, Tensor] = {}  # tied weights once
        self._layers: list[tuple[Any, Callable[[Tensor], Tensor]]] = []
        for module in layers:
            weight = module.weight.detach()
            weight = weight.T if isinstance(module, Conv1D) else weight
            if id(module.weight) not in packed:
                packed[id(module.weight)] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
            self._layers.append((module, _product(packed[id(module.weight)], weight, module.bias)))
        self.size = second_layout(model)

    @contextmanager
    def use(self) -> Iterator[None]:
        """Within this context the layers compute with the second layout. A copy of the model knows nothing of it."""
        for module, product in self._layers:
            module.__dict__["forward"] = product
        try:
            yield
        finally:
            for module, _ in self._layers:
                module.__dict__.pop("forward", None)


def can_prepack(module: Any) -> bool:
    """Whether a layer's weight can be held in oneDNN's layout."""
    if type(module) not in (torch.nn.Linear, Conv1D):
        return False
    weight = module.weight
    return type(weight.data) is Tensor and weight.dtype is torch.float32 and weight.device.type in ("cpu", "meta")


def second_layout(model: Any) -> int:
    """Bytes that the second layout of a model's layers takes; tied weights count once."""
    weights = {id(module.weight): module.weight for module in model.modules() if can_prepack(module)}
    return sum(4 * weight.numel() for weight in weights.values())


def _product(packed: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    bias = None if bias is None else bias.detach()

    def product(x: Tensor) -> Tensor:
        if x.numel() <= x.shape[-1]:  # one row
            return linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return product
