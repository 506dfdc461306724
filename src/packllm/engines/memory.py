"""Memory estimates before loading, from configs and file headers only."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from packllm.chat.prompt import Encoder
from packllm.engines.llama_cpp.adapters import read_adapter
from packllm.engines.load import Loader, as_list
from packllm.engines.member import Author, Member
from packllm.engines.server.address import Address, is_address
from packllm.engines.spec import Spec, is_spec, of_worker
from packllm.engines.transformers.files import own_tokenizer
from packllm.engines.transformers.footprint import Footprint, free_where
from packllm.errors import LoadError, OptionError


@dataclass(frozen=True)
class MemberEstimate:
    """The memory that a member will need. None means unknown.

    Attributes:
        member: its name.
        engine: the engine that will run it.
        dtype: type of its weights.
        parameters: number of parameters; for an adapter, without its base.
        weights: bytes of its weights; a base that several members share counts for the first of them.
        token_bytes: bytes of cache per token.
        window: context window in tokens.
        window_bytes: bytes of cache of one sequence of that length.
        note: what is uncertain or unknown, and why.
    """

    member: str
    engine: str = ""
    dtype: str = "?"
    parameters: int | None = None
    weights: int | None = None
    token_bytes: int | None = None
    window: int | None = None
    window_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Estimate:
    """The memory that a pack will need. Iterating gives (member, bytes of weights, bytes of cache per token), as
    Pack.memory() does.

    Attributes:
        members: the estimate of each member.
        free: free bytes where the weights will be.
        place: the name of that place.
        vocabulary, template, end: whether all members share their text tokens, their chat template, and what ends their
            answers; None if it is not known for all.
    """

    members: tuple[MemberEstimate, ...]
    free: int
    place: str
    vocabulary: bool | None = None
    template: bool | None = None
    end: bool | None = None

    def __iter__(self) -> Iterator[tuple[str, int | None, int | None]]:
        return iter([(each.member, each.weights, each.token_bytes) for each in self.members])

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, at: int) -> tuple[str, int | None, int | None]:
        return list(self)[at]

    @property
    def weights(self) -> int:
        """Bytes of all known weights."""
        return sum(each.weights or 0 for each in self.members)

    @property
    def token_bytes(self) -> int:
        """Bytes of cache per token, of all members together."""
        return sum(each.token_bytes or 0 for each in self.members)

    @property
    def window_bytes(self) -> int:
        """Bytes of the caches of one request that fills each member's window."""
        return sum(each.window_bytes or 0 for each in self.members)

    @property
    def fits(self) -> bool:
        """Whether the weights fit into the free memory."""
        return self.weights <= self.free

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        sums = ("weights", "token_bytes", "window_bytes", "free", "place", "fits", "vocabulary", "template", "end")
        return {"members": [vars(each) for each in self.members], **{name: getattr(self, name) for name in sums}}

    def rows(self) -> list[tuple[str, ...]]:
        """The table as texts: headings, a row per member, the sums."""
        rows: list[tuple[str, ...]] = [
            ("member", "engine", "type", "parameters", "weights", "cache/token", "cache at window")
        ]
        for each in self.members:
            window = "" if each.window is None else f" ({each.window:,})"
            count = "?" if each.parameters is None else _count(each.parameters)
            weights, token, whole = map(size_of, (each.weights, each.token_bytes, each.window_bytes))
            rows.append((each.member, each.engine, each.dtype, count, weights, token, whole + window))
        if len(self.members) > 1:
            sizes = map(size_of, (self.weights, self.token_bytes, self.window_bytes))
            rows.append(("together", "", "", "", *sizes))
        return rows

    def remarks(self) -> list[str]:
        """Remarks beside the table, one line each."""
        room = "fit in" if self.fits else "do not fit in"
        lines = [f"The weights take {size_of(self.weights)} and {room} the {size_of(self.free)} free ({self.place})."]
        if len(self.members) > 1:
            shared = {"vocabulary": self.vocabulary, "chat template": self.template, "end of answers": self.end}
            answers = {True: "one", False: "several", None: "not known"}
            lines.append("; ".join(f"{name}: {answers[value]}" for name, value in shared.items()) + ".")
        return lines + [f"{each.member}: {each.note}" for each in self.members if each.note]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        table = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*table, *self.remarks()])


def estimate(
    models: Any,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = "auto",
    trust_remote_code: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    quantization: Any = None,
    engine: str | None = None,
    prepack: bool = False,
) -> Estimate:
    """Estimate the memory of a pack before it is loaded, from configs and file headers; no weights are read.

    Weights are accurate to about a tenth. Caches are those of one sequence; a request has one for each member.

    Args:
        models: as for Pack.load; Member objects count what they need already.
        dtype, device_map, trust_remote_code, model_kwargs, quantization, engine, prepack: as for Pack.load.

    Raises:
        LoadError: a model does not exist or cannot be loaded. A hub id that is not in the local cache is no error: its
            row says what is unknown.
    """
    loader = Loader(dtype, device_map, trust_remote_code, model_kwargs, quantization, engine=engine, prepack=prepack)
    models_ = as_list(models)
    servers = {
        at: os.fspath(model) for at, model in enumerate(models_) if is_spec(model) and is_address(os.fspath(model))
    }
    workers = {at: match for at, model in enumerate(models_) if (match := of_worker(model))}
    specs = {
        at: loader.spec(os.fspath(m))
        for at, m in enumerate(models_)
        if is_spec(m) and at not in servers and at not in workers
    }
    looks = _Looks(loader, Counter(spec.key for spec in specs.values()))
    rows: list[MemberEstimate] = []
    speeches: list[_Speech | None] = []
    for at, model in enumerate(models_):
        row: MemberEstimate
        speech: _Speech | None
        if at in servers:
            address = Address.of(servers[at])
            row, speech = MemberEstimate(address.called, weights=0, token_bytes=0, note="it is on a server"), None
        elif at in workers:
            row, speech = _elsewhere(workers[at])
        else:
            row, speech = looks.at(specs[at]) if at in specs else _loaded(loader.members([model])[0])
        names = {other.member for other in rows}
        name, count = row.member, 2
        while name in names:  # as the loader makes names unique
            name, count = f"{row.member}-{count}", count + 1
        rows.append(replace(row, member=name))
        speeches.append(speech)
    free, place = free_where(loader.device_map)
    return Estimate(tuple(rows), free, place, *_shared(speeches))


def refuse(models: Any, most: int, **loading: Any) -> None:
    """Refuse models whose weights need more than `most` bytes.

    Raises:
        LoadError: they need more, or their size is unknown; the message has the table.
    """
    total = estimate(models, **loading)
    unknown = [each.member for each in total.members if each.weights is None]
    if unknown:
        raise LoadError(f"max_memory={size_of(most)} cannot be checked: the size of {unknown[0]!r} is unknown\n{total}")
    if total.weights > most:
        raise LoadError(
            f"the weights take {size_of(total.weights)}, more than max_memory={size_of(most)}; leave members out, give "
            f"smaller or quantised ones (.gguf), or allow more\n{total}"
        )


def bytes_of(limit: Any) -> int | None:
    """`max_memory` in bytes; None for None and for accelerate's mapping.

    Raises:
        OptionError: it is none of these.
    """
    if limit is None or isinstance(limit, Mapping):
        return None
    units = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
        return limit
    if isinstance(limit, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", limit, re.I)):
        base = 1024 if match[3] else 1000
        if (size := int(float(match[1]) * base ** units[match[2].upper()])) > 0:
            return size
    raise OptionError(
        f'max_memory={limit!r} is no size; give bytes (8589934592), "8GiB" or accelerate\'s mapping {{0: "20GiB"}}'
    )


def size_of(count: int | None) -> str:
    """A size in bytes as text with a unit."""
    if count is None:
        return "?"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.{1 if count < 100 * size else 0}f} {unit}"
    return f"{count} B"


def _count(parameters: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.1f} {unit}"
    return str(parameters)


def held(members: Sequence[Author]) -> list[tuple[str, int, int]]:
    """(member, bytes of weights, bytes of cache per token) of loaded members. Shared weights count for the first member
    that has them."""
    seen_parts: set[Any] = set()
    rows = []
    for member in members:
        if not isinstance(member, Member):  # on a server
            rows.append((member.name, 0, 0))
            continue
        parts = member.engine.held(member.adapter)
        rows.append((member.name, sum(parts[key] for key in parts.keys() - seen_parts), member.engine.token_bytes))
        seen_parts |= parts.keys()
    return rows


@dataclass(frozen=True)
class _Speech:
    """What members must share to be fused well: text tokens, chat template, and the end of answers."""

    vocabulary: str
    template: str
    ends: frozenset[bytes]

    @classmethod
    def of(cls, encoder: Encoder, ends: Iterable[int]) -> _Speech:
        vocabulary = encoder.vocabulary
        ids = {*ends, vocabulary.special.get("eos"), encoder.end_of_turn}
        spellings = frozenset(vocabulary.tokens[i] for i in ids if i is not None and i < len(vocabulary))
        return cls(vocabulary.family, str(encoder.template), spellings)


def _shared(speeches: Sequence[_Speech | None]) -> tuple[bool | None, bool | None, bool | None]:
    """Whether all members have the same text tokens, template and end; None if it is not known for all."""
    known = [(speech.vocabulary, speech.template, speech.ends) for speech in speeches if speech is not None]
    sure = True if len(known) == len(speeches) else None
    if not known:
        return None, None, None
    vocabulary, template, end = (False if len(set(values)) > 1 else sure for values in zip(*known, strict=True))
    return vocabulary, template, end


def _elsewhere(match: re.Match[str]) -> tuple[MemberEstimate, _Speech | None]:
    """The row of a member in a worker."""
    name = match[1] or os.path.basename(match[3])
    return MemberEstimate(name, "ray", weights=0, note="it runs in a worker, and takes nothing here"), None


def _loaded(member: Member) -> tuple[MemberEstimate, _Speech]:
    """The row of a member that is in memory already: it needs no more."""
    engine, window = member.engine, member.context_window
    row = MemberEstimate(
        member.name,
        weights=0,
        token_bytes=engine.token_bytes,
        window=window,
        window_bytes=None if window is None else window * engine.token_bytes,
        note="it is in memory already",
    )
    return row, _Speech.of(member.encoder, member.end_ids)


class _Looks:
    """Makes the rows of members, and counts once what they share."""

    def __init__(self, loader: Loader, uses: Mapping[str, int]) -> None:
        self._loader, self._uses = loader, uses
        self._bases: dict[str, Footprint] = {}
        self._counted: set[str] = set()

    def at(self, spec: Spec) -> tuple[MemberEstimate, _Speech | None]:
        """The row of a spec, and its text tokens, template and end."""
        try:
            if spec.key not in self._bases:
                self._bases[spec.key] = self._loader.footprint(spec)
            base = self._bases[spec.key]
            encoder = None if base.tokenizer is None else Encoder(base.tokenizer)
            parameters, bytes_, shares = base.parameters, 0, True
            if spec.adapter is not None and base.engine == "llama.cpp" and os.path.isfile(spec.adapter):
                header = read_adapter(Path(spec.adapter))
                parameters, bytes_ = header.elements, header.nbytes
            elif spec.adapter is not None:
                parameters, bytes_, shares, encoder = self._adapter(spec, base, encoder)
        except LoadError as error:
            if os.path.exists(spec.base) and (spec.adapter is None or os.path.exists(spec.adapter)):
                raise
            return MemberEstimate(spec.name, note=str(error)), None
        if shares and spec.key not in self._counted:
            self._counted.add(spec.key)
            bytes_ += base.weights
        row = MemberEstimate(
            spec.name,
            base.engine,
            base.dtype,
            parameters,
            bytes_,
            base.cache.token_bytes,
            base.window,
            None if base.window is None else base.cache.after(base.window),
            base.note,
        )
        return row, None if encoder is None else _Speech.of(encoder, base.ends)

    def _adapter(self, spec: Spec, base: Footprint, encoder: Encoder | None) -> tuple[int, int, bool, Encoder | None]:
        """(parameters, bytes, whether it shares its base, encoder) of a member with an adapter folder."""
        assert spec.adapter is not None
        adapter = self._loader.adapter(spec.adapter, weights=False)
        parameters = sum(tensor.numel() for tensor in adapter.tensors.values())
        base_encoder = encoder
        if base.tokenizer is not None:
            tokenizer = own_tokenizer(adapter.folder, base.tokenizer, base.config)
            encoder = encoder if tokenizer is None else Encoder(tokenizer)
        factors = adapter.factors()
        if factors is None:  # peft makes a copy of the base
            return parameters, base.weights, False, encoder
        if self._uses[spec.key] == 1 and base.engine != "llama.cpp":  # merged into it
            return parameters, 0, True, encoder
        merged = (
            base_encoder is not None and encoder is not None and not encoder.vocabulary.same_as(base_encoder.vocabulary)
        )
        bytes_ = base.item * sum(
            up.shape[0] * down.shape[1] if merged else up.numel() + down.numel() for down, up in factors.values()
        )
        return parameters, bytes_, True, encoder
