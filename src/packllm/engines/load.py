"""From what a user names (hub id, folder, .gguf file, base+adapter, each as name=... too) to members."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from packllm.cache import cache_folder
from packllm.chat.prompt import Encoder
from packllm.engines.member import Member
from packllm.engines.transformers.adapters import Adapters
from packllm.engines.transformers.engine import Engine
from packllm.engines.transformers.lora import merge, read
from packllm.engines.transformers.precision import fastest
from packllm.errors import LoadError, OptionError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Loader:
    """Loads members; a base that several adapters share is read from disk once.

    Args:
        dtype: "auto" (as stored), "fastest" (float32 or bfloat16, as measured once on this CPU; as stored where
            there is an accelerator), "float32", "float16", "bfloat16" or a torch dtype.
        device_map: as in accelerate; "auto" spreads over the accelerators, or stays on the CPU.
        trust_remote_code: run code that comes with a hub model.
    """

    def __init__(
        self, dtype: str | torch.dtype = "auto", device_map: Any = "auto", trust_remote_code: bool = False
    ) -> None:
        if isinstance(dtype, str) and dtype not in ("auto", "fastest", *_DTYPES):
            raise OptionError(f"dtype={dtype!r} is unknown; valid: auto, fastest, {', '.join(_DTYPES)}")
        if dtype == "fastest":
            dtype = "auto" if torch.accelerator.is_available() else fastest()
        self._dtype = _DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        self._device_map = "cpu" if device_map == "auto" and not torch.accelerator.is_available() else device_map
        self._trust = trust_remote_code
        self._bases: dict[str, _Base] = {}

    def members(self, models: Sequence[str | os.PathLike | Member]) -> list[Member]:
        """One member per model, with names that differ.

        Raises:
            LoadError: nothing to load, a path that does not exist, files that are no model.
        """
        if not models:
            raise LoadError("models is empty; name at least one hub id, folder, .gguf file or base+adapter")
        specs = {i: _Spec.of(os.fspath(model)) for i, model in enumerate(models) if not isinstance(model, Member)}
        uses = Counter(spec.base for spec in specs.values())
        members: list[Member] = []
        for i, model in enumerate(models):
            member = model if isinstance(model, Member) else self._member(specs[i], uses[specs[i].base] > 1)
            taken = {other.name for other in members}
            name, count = member.name, 2
            while name in taken:
                name, count = f"{member.name}-{count}", count + 1
            if name != member.name:
                member = copy.copy(member)  # the caller's own, or another pack's, keeps its name
                member.name = name
            members.append(member)
        return members

    def _member(self, spec: _Spec, shared: bool) -> Member:
        """A member of the base's own engine, if others share it; an adapter used alone is merged, which is faster."""
        base = self._base(spec.base)
        if spec.adapter is None:
            return Member(base.model, base.tokenizer, spec.name, base.encoder, engine=base.engine)
        factors = read(spec.adapter) if shared else None
        if factors is None:
            return Member(merge(base.model, spec.adapter), base.tokenizer, spec.name, base.encoder)
        if base.engine.adapters is None:
            base.engine.adapters = Adapters(base.model)
        try:
            adapter = base.engine.adapters.attach(factors)
        except (ValueError, AttributeError) as error:
            raise LoadError(f"cannot load adapter {spec.adapter!r}: {_first_line(error)}") from error
        return Member(base.model, base.tokenizer, spec.name, base.encoder, engine=base.engine, adapter=adapter)

    def _base(self, spec: str) -> _Base:
        if spec not in self._bases:
            source: str | Path = converted(Path(spec)) if spec.endswith(".gguf") else spec
            model, tokenizer, encoder = self._read(source)
            self._bases[spec] = _Base(model, tokenizer, encoder, Engine(model, encoder.vocabulary))
        return self._bases[spec]

    def _read(self, source: str | Path) -> tuple[Any, Any, Encoder]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=self._trust)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=self._dtype,
                device_map=self._device_map,
                trust_remote_code=self._trust,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            remedy = "; trust_remote_code=True runs it" if "trust_remote_code" in str(error) else ""
            raise LoadError(f"cannot load model {str(source)!r}: {_first_line(error)}{remedy}") from error
        model, info = loaded
        if missing := sorted(info["missing_keys"]):  # transformers would go on with random ones
            raise LoadError(f"model {str(source)!r} lacks {len(missing)} of its weights, such as {missing[0]!r}")
        return model, tokenizer, Encoder(tokenizer)


@dataclass(frozen=True)
class _Base:
    """A model as loaded, with the engine of the members that share it."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    engine: Engine


@dataclass(frozen=True)
class _Spec:
    """What a user names: a base and perhaps an adapter, each a path that exists or something that may be a hub id."""

    name: str
    base: str
    adapter: str | None

    @classmethod
    def of(cls, text: str) -> _Spec:
        named = None if os.path.exists(text) else re.match(r"([\w.-]+)=", text)
        base, adapter = _split(text[named.end() :] if named else text)
        return cls(named[1] if named else _name(adapter or base), base, adapter)


def _split(spec: str) -> tuple[str, str | None]:
    if os.path.exists(spec):
        return spec, None
    base, plus, adapter = spec.rpartition("+")
    parts = (base, adapter) if plus else (spec, None)
    for part in parts:
        if part is not None and not os.path.exists(part) and not _HUB_ID.fullmatch(part):
            raise LoadError(f"model {part!r} does not exist; give a hub id, a folder, a .gguf file or base+adapter")
        if part is not None and part.endswith(".gguf") and not os.path.exists(part):
            raise LoadError(f"model file {part!r} does not exist")
    return parts


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path)).removesuffix(".gguf")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def converted(path: Path) -> Path:
    """Folder with the model of a .gguf file as float32 safetensors, made on the first call.

    Reading GGUF takes transformers 20 to 70 seconds; the folder then loads in one or two.
    """
    folder = cache_folder() / "gguf" / f"{path.stem}-{_file_key(path)}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        _convert(path, draft)
        # Renaming is atomic: another process sees the whole folder or none.
        os.rename(draft, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _file_key(path: Path) -> str:
    """Hash of a file's size, first and last MiB: enough to tell models apart without reading gigabytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(2**20)
        file.seek(max(0, size - 2**20))
        digest = hashlib.sha256(size.to_bytes(8, "big") + head + file.read())
    return digest.hexdigest()[:16]


def _convert(path: Path, folder: Path) -> None:
    try:
        import gguf  # noqa: F401  (transformers reads the format through it)
    except ImportError:
        raise LoadError(f"{str(path)!r} needs the gguf package; install packllm[gguf]") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, file = str(path.parent), path.name
    with tqdm(total=3, desc=f"Converting {file} (once)", unit="step", disable=None) as bar:
        try:
            model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
            bar.update()
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
            bar.update()
        except (OSError, ValueError, KeyError, IndexError, struct.error) as error:  # cut files end anywhere
            raise LoadError(f"cannot read {str(path)!r}: {_first_line(error)}") from error
        # The quantisation config that stays on the model blocks saving: build a clean one.
        settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        clean = type(model)(type(model.config).from_dict(settings))
        clean.load_state_dict(model.state_dict())
        clean.generation_config = model.generation_config
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()
