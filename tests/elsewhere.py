"""Tensors that behave as on a GPU, without one: they say that they are on cuda:0, and refuse tensors of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

CUDA = torch.device("cuda", 0)

TO_THE_CPU = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
"""Copies to the CPU that need not be asked for."""
INDEXED = {Tensor.__getitem__, Tensor.__setitem__}
"""Indices may be on the CPU, and what is copied into a slice."""
IMPOSSIBLE = {Tensor.numpy, Tensor.__array__}


class Elsewhere(Tensor):
    """A tensor of the pretended GPU. Its numbers are in memory as any other's."""

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in IMPOSSIBLE:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is Tensor.cpu:
            return plain(args[0])
        if function is Tensor.to:
            return moved(*args, **kwargs)
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        strangers = [one for one in tensors if not isinstance(one, Elsewhere) and one.dim()]
        if strangers and function not in INDEXED and function is not Tensor.copy_:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, found cuda:0 and cpu")
        if kwargs.pop("device", CUDA) != CUDA:
            raise RuntimeError(f"{function}: on another device")
        result = function(*tree_map(plain, args), **tree_map(plain, kwargs))
        home = function in INDEXED and not isinstance(args[0], Elsewhere)  # a slice of the CPU's
        return result if home or function in TO_THE_CPU else tree_map(elsewhere, result)


def elsewhere(value: Any) -> Any:
    return value.as_subclass(Elsewhere) if type(value) is Tensor else value


def plain(value: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor) if isinstance(value, Elsewhere) else value


def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to, to or from the pretended GPU."""
    wanted = [*args, *kwargs.values()]
    others = [one for one in wanted if isinstance(one, Tensor)]
    places = [torch.device(one) for one in wanted if isinstance(one, (str, torch.device))]
    kinds = [one for one in wanted if isinstance(one, torch.dtype)] + [one.dtype for one in others]
    place = next(iter([*places, *(one.device for one in others)]), tensor.device)
    number = plain(tensor).to(kinds[0]) if kinds else plain(tensor)
    return elsewhere(number) if place.type == "cuda" else number


class _Factories(TorchFunctionMode):
    """Tensors that are made on cuda:0, or moved there, are Elsewhere."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is Tensor.to and not isinstance(args[0], Elsewhere):
            return moved(*args, **kwargs)
        if kwargs.get("device") == CUDA:
            del kwargs["device"]
            return tree_map(elsewhere, function(*tree_map(plain, args), **kwargs))
        return function(*args, **kwargs)


@contextmanager
def pretended(monkeypatch: Any, *engines: Any) -> Iterator[None]:
    """What these engines return is on the pretended GPU, as it would be with models there. In this thread only: torch
    keeps its modes by thread."""

    def wrap(engine: Any, name: str, before: Any = lambda value: value) -> None:
        real = getattr(engine, name)
        monkeypatch.setattr(engine, name, lambda *args: tree_map(elsewhere, real(*tree_map(before, args))))

    for engine in engines:
        wrap(engine, "_logprobs")
        wrap(engine, "hidden", plain)
        wrap(engine, "logits", plain)
        wrap(engine, "head")
    with _Factories():
        yield
